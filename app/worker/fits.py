"""The jobs that make an index or a new generation of one: a sharded pipeline whose result becomes an index."""

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from app.banks import service as banks
from app.indexes import generations
from app.storage.artifacts import crash_point
from app.worker.banks import published_groups
from app.worker.runner import Kind, Runner, Running, computed, own_folder, stopwatch
from app.worker.sharded import assist, device_of, shard_files, work_through
from attribution_core.errors import Cancelled
from attribution_core.fit_spec import FitSummary
from attribution_core.methods.bank import BankPipeline
from attribution_core.methods.extend import pipeline_of
from attribution_core.methods.fit import AnyPipeline


async def lead_fit(runner: Runner, running: Running) -> Callable[[AsyncSession], Awaitable[None]]:
    """Work through all stages, assemble, publish, and return what makes the index visible."""
    job, clock = running.job, stopwatch()
    pipeline, work = await _prepared(runner, running)
    async with runner.sessions() as session:
        name = await generations.artifact_of(session, job.id)
    timings = await work_through(runner, running, pipeline, work)
    assemble_clock = stopwatch()
    files = shard_files(work, pipeline.stages()[-1])
    folder = own_folder(runner, running, "artifact")
    summary = await computed(lambda: _assembled(pipeline, folder, files, running), running.progress)
    assert isinstance(summary, FitSummary)
    running.progress.advance(0)
    bank, made = await _new_groups(runner, running, pipeline, files)
    published = runner.artifacts.publish(folder, name)
    timings |= {"assemble": assemble_clock(), "total": clock()}

    async def effect(session: AsyncSession) -> None:
        crash_point("before-commit")
        if bank is not None:
            await banks.add_groups(session, bank, [row for _, row in made])
        superseded = await generations.finish(session, job.id, summary, published, timings)
        running.after_success.extend(partial(runner.artifacts.delete, name) for name in superseded)

    return effect


async def assist_fit(runner: Runner, running: Running) -> None:
    """Work on the open stage's shards beside the worker that leads."""
    await assist(runner, running, lambda: _prepared(runner, running))


async def _new_groups(
    runner: Runner, running: Running, pipeline: AnyPipeline, files: list[Path]
) -> tuple[str | None, list[tuple[str, dict[str, Any]]]]:
    """Publish what a fit retrained for its bank; return the bank's id and the rows that name the groups."""
    if not isinstance(pipeline, BankPipeline):
        return None, []
    async with runner.sessions() as session:
        bank = await banks.find(session, await generations.bank_of(session, running.job.id))
    places = [(bank.id, banks.folder_of(bank))]
    made = await computed(
        lambda: published_groups(runner, running, places, pipeline.new_groups(files)), running.progress
    )
    assert isinstance(made, list)
    return bank.id, made


async def _prepared(runner: Runner, running: Running) -> tuple[AnyPipeline, Path]:
    async with runner.sessions() as session:
        spec = await generations.spec_of_job(session, running.job.id, runner.settings, runner.artifacts)
    work = runner.artifacts.workspace(running.job.id)
    pipeline = await computed(lambda: pipeline_of(spec, work, device_of(runner)), running.progress)
    assert isinstance(pipeline, AnyPipeline)
    return pipeline, work


def _assembled(pipeline: AnyPipeline, folder: Path, files: list[Path], running: Running) -> FitSummary:
    """Lay out the artifact."""
    if running.progress.stopping:
        raise Cancelled("the job was stopped")
    return pipeline.assemble(folder, files, running.progress)


FIT = Kind(lead_fit, assist_fit)
