"""The training job: runs of a recipe become checkpoints of its model."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession

from app.models import service as models
from app.models.schemas import CheckpointMeta
from app.replay import plans as replays
from app.replay.schemas import TrainingCreate
from app.worker.runner import Kind, Runner, Running, computed, own_folder
from app.worker.sharded import assist, device_of, shard_files, work_through
from attribution_core.errors import InvalidInputError
from attribution_core.training.pipeline import TrainedCheckpoint, TrainingPipeline
from attribution_core.weights import WeightsSummary, check_weights

Made = tuple[CheckpointMeta, str, WeightsSummary]


async def lead_training(runner: Runner, running: Running) -> Callable[[AsyncSession], Awaitable[None]]:
    """Train every seed, publish the checkpoints, and return what makes them visible.

    Raises:
        InvalidInputError: if every seed diverged.
    """
    replay_id = running.job.resource_id
    pipeline, work, request, parameters = await _planned(runner, running)
    await work_through(runner, running, pipeline, work)
    files = shard_files(work, pipeline.stages()[0])
    diverged = pipeline.diverged(files)
    if len(diverged) == len(request.seeds):
        raise InvalidInputError(
            "every training diverged: the weights stopped being finite; lower the learning rate", "/recipe"
        )

    def published() -> list[Made]:
        folder = own_folder(runner, running, "checkpoints")
        made = []
        for trained in pipeline.write_checkpoints(files, folder):
            summary = check_weights(trained.path, parameters)
            checkpoint_id = models.stable_checkpoint_id(replay_id, trained.seed, trained.step)
            models.publish_checkpoint(runner.artifacts, checkpoint_id, trained.path)
            made.append((_meta(request, trained), checkpoint_id, summary))
        return made

    made = await computed(published, running.progress)
    running.progress.advance(0)

    async def effect(session: AsyncSession) -> None:
        assert isinstance(made, list)
        await replays.finish_training(session, replay_id, made, diverged)

    return effect


async def assist_training(runner: Runner, running: Running) -> None:
    """Train some of the seeds beside the worker that leads."""

    async def prepared() -> tuple[TrainingPipeline, Path]:
        pipeline, work, _, _ = await _planned(runner, running)
        return pipeline, work

    await assist(runner, running, prepared)


async def _planned(
    runner: Runner, running: Running
) -> tuple[TrainingPipeline, Path, TrainingCreate, dict[str, dict[str, object]]]:
    async with runner.sessions() as session:
        spec, request, parameters = await replays.training_plan(
            session, running.job.resource_id, runner.settings, runner.artifacts
        )
    work = runner.artifacts.workspace(running.job.id)
    pipeline = await computed(
        lambda: TrainingPipeline(spec, request.seeds, request.save_every, device_of(runner)), running.progress
    )
    assert isinstance(pipeline, TrainingPipeline)
    return pipeline, work, request, parameters


def _meta(request: TrainingCreate, trained: TrainedCheckpoint) -> CheckpointMeta:
    return CheckpointMeta(
        run=f"{request.run}-{trained.seed}",
        step=trained.step,
        epoch=trained.epoch,
        learning_rate=trained.learning_rate,
        seed=trained.seed,
        final=trained.final,
    )


TRAINING = Kind(lead_training, assist_training)
