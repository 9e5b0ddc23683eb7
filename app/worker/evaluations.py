"""The evaluation job: missing retrainings, then every measure; the result becomes the index's quality."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession

from app.banks import service as banks_service
from app.replay import plans as replays
from app.storage.artifacts import crash_point
from app.worker.banks import published_groups
from app.worker.runner import Kind, Runner, Running, computed
from app.worker.sharded import assist, device_of, settle, shard_files, work_through
from attribution_core.evaluate.pipeline import Evaluated, EvaluationPipeline


async def lead_evaluation(runner: Runner, running: Running) -> Callable[[AsyncSession], Awaitable[None]]:
    """Retrain what is missing, measure, publish the retrainings, and return what makes them and the quality visible."""
    pipeline, work, banks = await _prepared(runner, running)
    artifact = runner.artifacts.name_of(pipeline.spec.folder)
    await work_through(runner, running, pipeline, work)
    files = shard_files(work, pipeline.stages()[0])
    found = await computed(lambda: pipeline.conclude(files), running.progress)
    assert isinstance(found, Evaluated)
    running.progress.advance(0)
    made = await computed(lambda: published_groups(runner, running, banks, found.groups), running.progress)
    assert isinstance(made, list)
    calibration = None if found.calibration is None else found.calibration.as_json()

    async def effect(session: AsyncSession) -> None:
        crash_point("before-commit")
        for bank_id, _ in banks:
            await banks_service.add_groups(session, bank_id, [row for bank, row in made if bank == bank_id])
        await replays.finish_evaluation(session, running.job.resource_id, artifact, found.quality, calibration)

    return effect


async def assist_evaluation(runner: Runner, running: Running) -> None:
    """Retrain some of the groups beside the worker that leads."""

    async def prepared() -> tuple[EvaluationPipeline, Path]:
        pipeline, work, _ = await _prepared(runner, running)
        return pipeline, work

    await assist(runner, running, prepared)


async def _prepared(runner: Runner, running: Running) -> tuple[EvaluationPipeline, Path, list[tuple[str, str]]]:
    async with runner.sessions.begin() as session:
        spec, banks = await replays.evaluation_plan(session, running.job.resource_id, runner.settings, runner.artifacts)
    work = runner.artifacts.workspace(running.job.id)
    if spec.removal is not None:  # what it leaves out is chosen by the index; other retrainings are the bank's
        settle(work, runner.artifacts.name_of(spec.folder))
    pipeline = await computed(lambda: EvaluationPipeline(spec, device_of(runner), running.progress), running.progress)
    assert isinstance(pipeline, EvaluationPipeline)
    return pipeline, work, banks


EVALUATION = Kind(lead_evaluation, assist_evaluation)
