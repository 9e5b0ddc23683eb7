"""Generations of an index: extended by new examples, or fitted anew; the one before answers until the next is whole."""

from typing import Any, Literal

from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets import service as datasets
from app.db.tables import Dataset, Index, IndexGeneration, Job
from app.errors import Conflict, InvalidRequest
from app.indexes import repository
from app.indexes import service as indexes
from app.jobs import service as jobs
from app.models import service as models
from app.settings import Settings
from app.storage.artifacts import ArtifactStore, Published
from attribution_core.fit_spec import FitSpec, FitSummary
from attribution_core.method_spec import METHODS

Kind = Literal["extension", "refresh"]


async def extend(
    session: AsyncSession, reference: str, dataset: str, settings: Settings, artifacts: ArtifactStore
) -> tuple[Index, Job]:
    """Submit a generation over a later version of the training set, with the factors there are.

    Raises:
        NotFound: if there is no such index or data set.
        NotReady: if one of them is not ready.
        Conflict: if the method cannot be extended, or another generation is being made.
        InvalidRequest: if the data set is no later version of the index's, or does not fit the model.
    """
    index = await _free(session, reference)
    if not METHODS[index.method["type"]].extends:
        raise Conflict(f"A {index.method['type']} index has no factors to keep: fit a new one to the later version.")
    later = await datasets.find_ready(session, dataset)
    if not await datasets.is_version_of(session, later, index.dataset_id):
        raise InvalidRequest("An index is extended to a later version of its data set.", pointer="/dataset")
    indexes.check_fits(await models.find(session, index.model_id), later)
    now = await indexes.answering(session, index)
    before = await datasets.find_ready(session, index.dataset_id)
    covered = before.num_examples or 0
    base = {
        "artifact": index.artifact,
        "fingerprint": index.fingerprint,
        "num_examples": covered,
        "fitted_examples": now.base["fitted_examples"] if now.base else covered - len(now.left_out),
    }
    left_out = await datasets.left_out(session, later)
    if (later.num_examples or 0) - covered == sum(row >= covered for row in left_out):
        raise InvalidRequest("Every example that this version adds was deleted.", pointer="/dataset")
    return await _submitted(session, index, "extension", later, left_out, base, settings, artifacts)


async def refresh(
    session: AsyncSession, reference: str, settings: Settings, artifacts: ArtifactStore
) -> tuple[Index, Job]:
    """Submit a generation fitted anew to the index's data set, without its deleted examples.

    Raises:
        NotFound: if there is no such index.
        NotReady: if it is not ready, or every example was deleted.
        Conflict: if another generation is being made.
    """
    index = await _free(session, reference)
    dataset = await datasets.find_ready(session, index.dataset_id)
    left_out = await datasets.left_out(session, dataset)
    return await _submitted(session, index, "refresh", dataset, left_out, None, settings, artifacts)


async def spec_of_job(session: AsyncSession, job_id: str, settings: Settings, artifacts: ArtifactStore) -> FitSpec:
    """Return everything that the generation which a job makes depends on.

    Raises:
        Conflict: if another one took its place.
    """
    generation = await _of_job(session, job_id)
    return await indexes.spec_of(
        session, await indexes.find(session, generation.index_id), generation, settings, artifacts
    )


async def artifact_of(session: AsyncSession, job_id: str) -> str:
    """Return the name under which a job publishes what it makes."""
    generation = await _of_job(session, job_id)
    return indexes.artifact_name(generation.index_id, generation.number)


async def bank_of(session: AsyncSession, job_id: str) -> str:
    """Return the bank that a job's index learns from; empty if it is none."""
    generation = await _of_job(session, job_id)
    return (await indexes.find(session, generation.index_id)).bank_id or ""


async def finish(
    session: AsyncSession, job_id: str, summary: FitSummary, published: Published, timings: dict[str, float]
) -> list[str]:
    """Make a fitted generation the one that answers; returns the artifacts that nothing needs any more.

    The generation before is kept until the next: questions that were asked of it may still be read from its files.
    """
    generation = await _of_job(session, job_id)
    index = await indexes.find(session, generation.index_id, lock=True)
    dropped = await repository.drop_generations(session, index.id, index.generation)
    if index.generation != generation.number:
        index.generation, index.dataset_id = generation.number, generation.dataset_id
        index.fingerprint, index.pending = generation.fingerprint, None
        index.quality = index.calibration = None  # they are of the generation before
    index.training_examples, index.drift = summary.num_training, summary.drift
    index.status, index.error = "ready", None
    index.artifact, index.bytes, index.dim = published.name, published.bytes, summary.dim
    index.coverage, index.recall, index.timings = summary.coverage, summary.recall, timings
    return [indexes.artifact_name(index.id, number) for number in dropped]


async def begin(session: AsyncSession, job: Job) -> None:
    """Record that a generation is being made again.

    Raises:
        Conflict: if another one took its place, or an index was built on the one that answers.
    """
    index = await indexes.find(session, job.resource_id, lock=True)
    if index.pending is None or index.pending["job"] != job.id:
        raise Conflict("A later job made, or makes, this index's next generation.")
    await _refuse_prior(session, index)
    index.pending = {**index.pending, "status": "building", "error": None}


async def fail(session: AsyncSession, index_id: str, error: dict[str, Any]) -> None:
    """Record why a generation was not made; the one before goes on answering."""
    index = await indexes.find(session, index_id, lock=True)
    if index.pending and (await jobs.find(session, index.pending["job"])).state in ("failed", "cancelled"):
        index.pending = {**index.pending, "status": "failed", "error": error}


async def _of_job(session: AsyncSession, job_id: str) -> IndexGeneration:
    generation = await repository.generation_of_job(session, job_id)
    if generation is None:
        raise Conflict("A later job made, or makes, this index's next generation.")
    return generation


async def _free(session: AsyncSession, reference: str) -> Index:
    index = await indexes.find_ready(session, reference, lock=True)
    if index.pending is not None and index.pending["status"] == "building":
        raise Conflict(f"Generation {index.pending['generation']} of this index is being made already.")
    await _refuse_prior(session, index)
    return index


async def _refuse_prior(session: AsyncSession, index: Index) -> None:
    if await repository.is_prior(session, index.id):
        raise Conflict("Another index is built on this generation; delete that first.")


async def _submitted(
    session: AsyncSession,
    index: Index,
    kind: Kind,
    dataset: Dataset,
    left_out: list[int],
    base: dict[str, Any] | None,
    settings: Settings,
    artifacts: ArtifactStore,
) -> tuple[Index, Job]:
    # A failed attempt keeps its number, so that nothing it may have published is taken for this one's.
    number = max(await repository.generation_numbers(session, index.id)) + 1
    generation = IndexGeneration(
        index_id=index.id, number=number, dataset_id=dataset.id, left_out=left_out, base=base, fingerprint=""
    )
    spec = await indexes.spec_of(session, index, generation, settings, artifacts)
    indexes.check_deletions(spec)
    generation.fingerprint = spec.fingerprint()
    passes = min(2, len(spec.method.passes)) if base else len(spec.method.stages)
    covered = base["num_examples"] if base else 0
    rows = spec.dataset.num_examples - covered - sum(row >= covered for row in left_out)
    total = rows * len(spec.members) * passes
    job = await jobs.submit(session, kind, "index", index.id, unit="examples", total=total)
    generation.job_id = job.id
    session.add(generation)
    index.pending = {
        "generation": number,
        "kind": kind,
        "status": "building",
        "dataset": dataset.id,
        "job": job.id,
        "error": None,
    }
    await session.flush()
    return index, job


jobs.RESOURCES["extension"] = jobs.RESOURCES["refresh"] = jobs.Resource(begin, fail)
