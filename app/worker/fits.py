"""The fit job: shards of each stage by any worker, reductions and assembly by one, publication by whoever leads."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import torch
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import Shard
from app.indexes import service as indexes
from app.jobs import repository
from app.jobs.queue import Queue
from app.storage.artifacts import crash_point
from app.worker.runner import Kind, LeaseLost, Runner, Running, computed, stopwatch
from attribution_core.arrays import write_arrays
from attribution_core.errors import AttributionError, Cancelled
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import FitSummary
from attribution_core.methods.fit import FitPipeline

REDUCTION = -1
_MAX_HELPERS = 8


async def lead_fit(runner: Runner, running: Running) -> Callable[[AsyncSession], Awaitable[None]]:
    """Plan the shards, work on them until all stages are done, assemble, publish, and return what makes it visible."""
    job, clock = running.job, stopwatch()
    pipeline, work = await _prepared(runner, running)
    await _plan(runner, running, pipeline)
    timings: dict[str, float] = {}
    while (stage := await _open_stage(runner, running)) is not None:
        stage_clock = stopwatch()
        await _work_on_stage(runner, running, pipeline, work, stage)
        name = pipeline.stages()[stage].name
        timings[name] = round(timings.get(name, 0.0) + stage_clock(), 3)
    assemble_clock = stopwatch()
    last = pipeline.stages()[-1]
    files = [_shard_path(work, last.name, shard.ordinal) for shard in last.shards]
    folder = work / "artifact"
    summary = await computed(lambda: _assembled(pipeline, folder, files, running), running.progress)
    assert isinstance(summary, FitSummary)
    running.progress.advance(0)
    published = runner.artifacts.publish(folder, f"indexes/{job.resource_id}")
    timings |= {"assemble": assemble_clock(), "total": clock()}

    async def effect(session: AsyncSession) -> None:
        crash_point("before-commit")
        await indexes.finish_fit(session, job.resource_id, summary, published, timings)

    return effect


async def assist_fit(runner: Runner, running: Running) -> None:
    """Work on the open stage's shards beside the worker that leads; stop when none is free."""
    stage = await _open_stage(runner, running)
    if stage is None:
        return
    pipeline, work = await _prepared(runner, running)
    async with runner.heartbeat(running):
        while await _one_shard(runner, running, pipeline, work, stage):
            pass
    return


async def _prepared(runner: Runner, running: Running) -> tuple[FitPipeline, Path]:
    async with runner.sessions() as session:
        spec = await indexes.fit_spec(session, running.job.resource_id, runner.settings, runner.artifacts)
    work = runner.artifacts.workspace(running.job.id)
    device = runner.settings.worker.device
    used = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    pipeline = await computed(lambda: FitPipeline(spec, work, used), running.progress)
    assert isinstance(pipeline, FitPipeline)
    return pipeline, work


async def _plan(runner: Runner, running: Running, pipeline: FitPipeline) -> None:
    """Write the shard rows of every stage, unless an earlier attempt did."""
    job_id = running.job.id
    async with runner.sessions.begin() as session:
        if not await repository.has_shards(session, job_id):
            rows = [
                Shard(
                    job_id=job_id, stage=number, ordinal=shard.ordinal, state="queued", units=shard.stop - shard.start
                )
                for number, stage in enumerate(pipeline.stages())
                for shard in stage.shards
            ]
            reductions = [
                Shard(job_id=job_id, stage=number, ordinal=REDUCTION, state="queued", units=0)
                for number in range(len(pipeline.stages()))
            ]
            await repository.add_shards(session, rows + reductions)
        done, total = await repository.units(session, job_id)
        await repository.set_progress(session, job_id, done, total, None)
    running.progress.restart(done)


async def _open_stage(runner: Runner, running: Running) -> int | None:
    async with runner.sessions() as session:
        return await repository.open_stage(session, running.job.id)


async def _work_on_stage(runner: Runner, running: Running, pipeline: FitPipeline, work: Path, stage: int) -> None:
    """Work until a stage and its reduction are done; when others hold what is left, wait for them or for their lease to end."""
    async with runner.sessions.begin() as session:
        helpers = min(await repository.waiting_shards(session, running.job.id) - 1, _MAX_HELPERS)
        if helpers > 0:
            await Queue.wake(session, running.job.id, helpers)
    while await _open_stage(runner, running) == stage:
        running.progress.advance(0)
        if not await _one_shard(runner, running, pipeline, work, stage):
            await asyncio.sleep(min(0.25, runner.lease_seconds / 4))


async def _one_shard(runner: Runner, running: Running, pipeline: FitPipeline, work: Path, stage: int) -> bool:
    """Claim and compute one shard or the reduction; returns whether there was one.

    Raises:
        LeaseLost: if another worker took it over meanwhile.
        AttributionError: if it failed too often.
    """
    async with runner.sessions.begin() as session:
        shard = await repository.claim_shard(session, running.job.id, stage, runner.name, runner.lease_seconds)
        if shard is None:
            return False
        done, _ = await repository.units(session, running.job.id)
    if shard.attempt > runner.settings.worker.max_attempts:
        raise AttributionError(f"shard {shard.ordinal} of stage {stage} ended its worker {shard.attempt - 1} times")
    running.shard = shard
    running.progress.restart(done)
    try:
        path = await computed(lambda: _computed_shard(pipeline, work, stage, shard, running), running.progress)
    finally:
        running.shard = None
    assert isinstance(path, Path)
    async with runner.sessions.begin() as session:
        if not await repository.finish_shard(session, shard, sha256_file(path)):
            raise LeaseLost
    return True


def _computed_shard(pipeline: FitPipeline, work: Path, number: int, shard: Shard, running: Running) -> Path:
    """Compute a shard or a reduction and write it; equal work gives equal bytes, so a late writer changes nothing."""
    stage = pipeline.stages()[number]
    if shard.ordinal == REDUCTION:
        path = work / f"{stage.name}.safetensors"
        files = [_shard_path(work, stage.name, part.ordinal) for part in stage.shards]
        write_arrays(path, pipeline.reduce(stage.name, files))
    else:
        path = _shard_path(work, stage.name, shard.ordinal)
        write_arrays(path, pipeline.run_shard(stage.name, shard.ordinal, running.progress))
    return path


def _assembled(pipeline: FitPipeline, folder: Path, files: list[Path], running: Running) -> FitSummary:
    """Lay out the artifact in an empty folder; an earlier attempt may have left a half-written one."""
    if running.progress.stopping:
        raise Cancelled("the job was stopped")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return pipeline.assemble(folder, files, running.progress)


def _shard_path(work: Path, stage: str, ordinal: int) -> Path:
    return work / stage / f"{ordinal:05d}.safetensors"


FIT = Kind(lead_fit, assist_fit)
