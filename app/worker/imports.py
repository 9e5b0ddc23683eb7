"""The import job: a user's file becomes a published data set."""

from collections.abc import Awaitable, Callable

from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets import service as datasets
from app.worker.runner import Kind, Runner, Running, computed, own_folder
from attribution_core.data.importer import DatasetSummary, import_dataset


async def run_import(runner: Runner, running: Running) -> Callable[[AsyncSession], Awaitable[None]]:
    """Convert the file in the job's workspace, publish it, and return what makes it visible."""
    job = running.job
    async with runner.sessions() as session:
        source, spec, parent = await datasets.import_plan(session, job.resource_id, runner.settings, runner.artifacts)
    if source.parent == runner.settings.data_dir / "uploads":
        running.after_success.append(lambda: source.unlink(missing_ok=True))
    folder = own_folder(runner, running, "dataset")
    summary = await computed(lambda: import_dataset(source, spec, folder, running.progress, parent), running.progress)
    assert isinstance(summary, DatasetSummary)
    running.progress.advance(0)
    published = runner.artifacts.publish(folder, f"datasets/{job.resource_id}")

    async def effect(session: AsyncSession) -> None:
        await datasets.finish_import(session, job.resource_id, summary, published)

    return effect


IMPORT = Kind(run_import)
