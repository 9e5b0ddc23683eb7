"""Work that is divided into stages of shards: any worker computes a shard, one reduces a stage, the one that leads goes on.

Rows say what is done; a shard's file is written whole and its bytes depend on nothing but the work, so a late writer changes nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import torch

from app.db.tables import Shard
from app.errors import Conflict
from app.jobs import repository
from app.jobs.queue import Queue
from app.worker.runner import LeaseLost, Runner, Running, computed, stopwatch
from attribution_core.arrays import write_arrays
from attribution_core.errors import AttributionError
from attribution_core.fingerprint import sha256_file, sha256_of
from attribution_core.sharding import Pipeline, Stage

REDUCTION = -1
_MAX_HELPERS = 8
Prepared = Callable[[], Awaitable[tuple[Pipeline, Path]]]


async def work_through(runner: Runner, running: Running, pipeline: Pipeline, work: Path) -> dict[str, float]:
    """Plan the shards, work on them until all stages are done, and return the seconds of each stage; 0 of one that was done before."""
    await _plan(runner, running, pipeline)
    timings = {stage.name: 0.0 for stage in pipeline.stages()}
    while (stage := await _open_stage(runner, running)) is not None:
        clock = stopwatch()
        await _work_on_stage(runner, running, pipeline, work, stage)
        name = pipeline.stages()[stage].name
        timings[name] = round(timings[name] + clock(), 3)
    return timings


async def assist(runner: Runner, running: Running, prepared: Prepared) -> None:
    """Work on the open stage's shards beside the worker that leads; stop when none is free."""
    stage = await _open_stage(runner, running)
    if stage is None:
        return
    pipeline, work = await prepared()
    async with runner.heartbeat(running):
        while await _one_shard(runner, running, pipeline, work, stage):
            pass


def settle(work: Path, subject: object) -> None:
    """Note what a job's shards are about when the first of them are planned, and hold later attempts and helpers to it.

    An index may get another generation or another damping while its job runs, and shards of both must not be mixed.

    Raises:
        Conflict: if it is another thing now.
    """
    mark, about = work / "subject", sha256_of(subject)
    if not mark.exists():
        part = mark.with_suffix(".part")
        part.write_text(about)
        part.rename(mark)
    elif mark.read_text() != about:
        raise Conflict("The index went over to another generation or damping since the job began: ask again.")


def shard_files(work: Path, stage: Stage) -> list[Path]:
    """Return a stage's shard files in order."""
    return [_shard_path(work, stage.name, shard.ordinal) for shard in stage.shards]


def device_of(runner: Runner) -> str:
    """Return where this worker's torch computes."""
    device = runner.settings.worker.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


async def _plan(runner: Runner, running: Running, pipeline: Pipeline) -> None:
    """Write the shard rows of every stage, unless an earlier attempt did."""
    job_id = running.job.id
    async with runner.sessions.begin() as session:
        if not await repository.has_shards(session, job_id):
            rows = [
                Shard(job_id=job_id, stage=number, ordinal=shard.ordinal, state="queued", units=shard.units)
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


async def _work_on_stage(runner: Runner, running: Running, pipeline: Pipeline, work: Path, stage: int) -> None:
    """Work until a stage and its reduction are done; when others hold what is left, wait for them or for their lease to end."""
    async with runner.sessions.begin() as session:
        helpers = min(await repository.waiting_shards(session, running.job.id) - 1, _MAX_HELPERS)
        if helpers > 0:
            await Queue.wake(session, running.job.id, helpers)
    while await _open_stage(runner, running) == stage:
        running.progress.advance(0)
        if not await _one_shard(runner, running, pipeline, work, stage):
            await asyncio.sleep(min(0.25, runner.lease_seconds / 4))


async def _one_shard(runner: Runner, running: Running, pipeline: Pipeline, work: Path, stage: int) -> bool:
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


def _computed_shard(pipeline: Pipeline, work: Path, number: int, shard: Shard, running: Running) -> Path:
    """Compute a shard or a reduction and write it; equal work gives equal bytes, so a late writer changes nothing."""
    stage = pipeline.stages()[number]
    if shard.ordinal == REDUCTION:
        path = work / f"{stage.name}.safetensors"
        write_arrays(path, pipeline.reduce(stage.name, shard_files(work, stage), running.progress))
    else:
        path = _shard_path(work, stage.name, shard.ordinal)
        write_arrays(path, pipeline.run_shard(stage.name, shard.ordinal, running.progress))
    return path


def _shard_path(work: Path, stage: str, ordinal: int) -> Path:
    return work / stage / f"{ordinal:05d}.safetensors"
