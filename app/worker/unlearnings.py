"""The unlearning job: new checkpoints without a forget set, compared with retrained ones where asked."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import Checkpoint
from app.models import service as models
from app.models.schemas import CheckpointMeta
from app.replay import plans as replays
from app.replay.schemas import UnlearnedCreate
from app.worker.runner import Kind, Runner, Running, computed, own_folder
from app.worker.sharded import assist, device_of, settle, shard_files, work_through
from attribution_core.unlearning.pipeline import NewCheckpoint, UnlearnPipeline
from attribution_core.weights import WeightsSummary, check_weights

Json = dict[str, Any]
Made = tuple[CheckpointMeta, str, WeightsSummary, Json]


async def lead_unlearning(runner: Runner, running: Running) -> Callable[[AsyncSession], Awaitable[None]]:
    """Unlearn every checkpoint, publish the new ones, and return what makes them visible."""
    replay_id = running.job.resource_id
    pipeline, work = await _prepared(runner, running)
    await work_through(runner, running, pipeline, work)
    async with runner.sessions() as session:
        request, sources, parameters = await replays.unlearned_sources(session, replay_id)
    files = shard_files(work, pipeline.stages()[-1])

    def published() -> tuple[list[Made], Json | None]:
        written, comparison = pipeline.conclude(files, own_folder(runner, running, "checkpoints"))
        return [_published(runner, replay_id, request, sources, parameters, new) for new in written], comparison

    found = await computed(published, running.progress)
    running.progress.advance(0)
    assert isinstance(found, tuple)
    made, comparison = found

    async def effect(session: AsyncSession) -> None:
        await replays.finish_unlearning(session, replay_id, made, comparison)

    return effect


async def assist_unlearning(runner: Runner, running: Running) -> None:
    """Do some of the shards beside the worker that leads."""
    await assist(runner, running, lambda: _prepared(runner, running))


async def _prepared(runner: Runner, running: Running) -> tuple[UnlearnPipeline, Path]:
    async with runner.sessions() as session:
        spec = await replays.unlearning_plan(session, running.job.resource_id, runner.settings, runner.artifacts)
    work = runner.artifacts.workspace(running.job.id)
    settle(work, runner.artifacts.name_of(spec.index))
    pipeline = await computed(lambda: UnlearnPipeline(spec, work, device_of(runner)), running.progress)
    assert isinstance(pipeline, UnlearnPipeline)
    return pipeline, work


def _published(
    runner: Runner,
    replay_id: str,
    request: UnlearnedCreate,
    sources: dict[str, Checkpoint],
    parameters: Json,
    new: NewCheckpoint,
) -> Made:
    source = sources[new.source]
    summary = check_weights(new.path, parameters)
    checkpoint_id = models.stable_checkpoint_id(replay_id, new.source)
    models.publish_checkpoint(runner.artifacts, checkpoint_id, new.path)
    meta = CheckpointMeta(
        run=f"{request.run}-{source.run}"[:64], step=source.step, epoch=source.epoch, seed=source.seed, final=False
    )
    return meta, checkpoint_id, summary, {"source": new.source, "report": new.report}


UNLEARNING = Kind(lead_unlearning, assist_unlearning)
