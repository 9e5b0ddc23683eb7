"""Registering, importing, listing and deleting data sets."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets import repository
from app.datasets.schemas import Column, DatasetOut, VersionCreate
from app.db.failures import is_duplicate
from app.db.ids import new_id
from app.db.tables import Dataset, Job
from app.errors import InUse, InvalidRequest, NameTaken, NotFound, NotReady
from app.jobs import service as jobs
from app.settings import Settings
from app.storage.artifacts import ArtifactStore, Published
from app.storage.roots import resolve
from app.web.pagination import Page, PageOf, cut
from attribution_core.data.formats import format_of
from attribution_core.data.importer import DatasetSummary
from attribution_core.data.reader import DatasetReader
from attribution_core.errors import CorruptArtifactError
from attribution_core.references import DatasetRef
from attribution_core.spec import DatasetSpec


async def create(
    session: AsyncSession, spec: DatasetSpec, settings: Settings, upload: tuple[Path, str] | None
) -> tuple[Dataset, Job]:
    """Register a data set and submit its import; an uploaded file stays under a name of ours until then.

    Raises:
        InvalidRequest: if the source or its format cannot be told.
        NameTaken: if a data set of that name exists.
    """
    return await _submitted(session, spec, settings, upload, None)


async def create_version(
    session: AsyncSession,
    reference: str,
    request: VersionCreate,
    settings: Settings,
    upload: tuple[Path, str] | None,
) -> tuple[Dataset, Job]:
    """Register a data set of a parent's rows and new ones, and submit its import.

    Raises:
        NotFound: if there is no such parent.
        NotReady: if the parent is not imported.
        InvalidRequest: if the source or its format cannot be told.
        NameTaken: if a data set of that name exists.
    """
    parent = await find_ready(session, reference)
    first = (await repository.lineage(session, parent))[0]
    suffix = f".v{parent.version + 1}"
    named = {"name": request.name or f"{first.name[: 64 - len(suffix)]}{suffix}"}
    spec = spec_of(parent).model_copy(update={**named, "format": request.format, "source": request.source})
    return await _submitted(session, spec, settings, upload, parent)


async def _submitted(
    session: AsyncSession,
    spec: DatasetSpec,
    settings: Settings,
    upload: tuple[Path, str] | None,
    parent: Dataset | None,
) -> tuple[Dataset, Job]:
    if upload is not None and spec.source is not None:
        raise InvalidRequest("Give either a file or a source.", pointer="/spec/source")
    if upload is None:
        if spec.source is None:
            raise InvalidRequest("Give a file as multipart, or `source` as `root:name/path`.", pointer="/source")
        resolve(settings.roots, spec.source)
    kind = spec.format or format_of(upload[1] if upload else spec.source or "")
    if kind is None:
        raise InvalidRequest("The file name does not tell its format; set `format`.", pointer="/format")
    dataset = Dataset(
        id=new_id("ds"),
        name=spec.name,
        status="importing",
        spec=spec.model_copy(update={"format": kind}).model_dump(mode="json"),
        upload=str(upload[0].name) if upload else None,
        parent_id=None if parent is None else parent.id,
        version=1 if parent is None else parent.version + 1,
    )
    session.add(dataset)
    try:
        await session.flush()
    except IntegrityError as error:
        if not is_duplicate(error):
            raise
        raise NameTaken(f"There is a data set {spec.name!r} already.", pointer="/name") from None
    job = await jobs.submit(session, "import", "dataset", dataset.id, unit="rows")
    dataset.job_id = job.id
    await session.flush()
    await session.refresh(dataset)
    return dataset, job


async def find(session: AsyncSession, reference: str, *, lock: bool = False, keep: bool = False) -> Dataset:
    """Return a data set by id or name.

    Raises:
        NotFound: if there is none.
    """
    dataset = await repository.find(session, reference, lock=lock, keep=keep)
    if dataset is None:
        raise NotFound(f"There is no data set {reference[:64]!r}.")
    return dataset


async def find_ready(session: AsyncSession, reference: str, *, keep: bool = False) -> Dataset:
    """Return an imported data set, kept from being deleted until the transaction ends where asked.

    Raises:
        NotFound: if there is none.
        NotReady: if it is being imported, or its import failed.
    """
    dataset = await find(session, reference, keep=keep)
    if dataset.status != "ready":
        raise NotReady(f"Data set {dataset.name!r} is {dataset.status}.")
    return dataset


async def list_datasets(session: AsyncSession, page: Page) -> PageOf[DatasetOut]:
    """Return one page of data sets, newest first."""
    rows, following = cut(await repository.page(session, page), page, "datasets")
    deleted = await repository.deleted_counts(session, [row.id for row in rows])
    return PageOf[DatasetOut](items=[_shown(row, deleted.get(row.id, 0)) for row in rows], next=following)


async def delete(session: AsyncSession, reference: str, artifacts: ArtifactStore, uploads: Path) -> Callable[[], None]:
    """Delete a data set; returns what removes its files once that is committed.

    Raises:
        InUse: if an index was fitted to it, a later version was made from it, a job needs it, or it is still being imported.
    """
    dataset = await find(session, reference, lock=True)
    if dataset.status == "importing":
        raise InUse(f"The data set is being imported; cancel its job {dataset.job_id} first.")
    await jobs.refuse_if_needed(session, dataset)
    await session.delete(dataset)
    try:
        await session.flush()
    except IntegrityError:
        raise InUse("An index or a later version refers to this data set; delete those first.") from None
    artifact, upload = f"datasets/{dataset.id}", dataset.upload

    def remove() -> None:
        artifacts.delete(artifact)
        _reader.cache_clear()
        if upload is not None:
            (uploads / upload).unlink(missing_ok=True)

    return remove


async def deleted_rows(session: AsyncSession, dataset_id: str) -> list[int]:
    """Return the deleted rows of a data set, ascending."""
    return await repository.deleted_rows(session, dataset_id)


async def left_out(session: AsyncSession, dataset: Dataset) -> list[int]:
    """Return the rows that a fit or a training leaves out, ascending: those that were deleted, of every version that has them.

    Raises:
        NotReady: if no other is left.
    """
    rows = await deleted_rows(session, dataset.id)
    if len(rows) == dataset.num_examples:
        raise NotReady(f"Every example of data set {dataset.name!r} was deleted.")
    return rows


async def is_version_of(session: AsyncSession, dataset: Dataset, ancestor_id: str) -> bool:
    """Return whether a data set was made from another one, which is not itself."""
    return ancestor_id in [version.id for version in (await repository.lineage(session, dataset))[:-1]]


async def import_plan(
    session: AsyncSession, dataset_id: str, settings: Settings, artifacts: ArtifactStore
) -> tuple[Path, DatasetSpec, DatasetReader | None]:
    """Return the file to import and how, and the data set whose rows come first."""
    dataset = await find(session, dataset_id)
    spec = DatasetSpec.model_validate(dataset.spec)
    parent = None if dataset.parent_id is None else reader_of(artifacts, await find_ready(session, dataset.parent_id))
    if dataset.upload is not None:
        return settings.data_dir / "uploads" / dataset.upload, spec, parent
    return resolve(settings.roots, spec.source or ""), spec, parent


async def finish_import(session: AsyncSession, dataset_id: str, summary: DatasetSummary, published: Published) -> None:
    """Make an imported data set visible."""
    dataset = await find(session, dataset_id, lock=True)
    if dataset.spec["kind"] == "tensor":
        dataset.spec = {**dataset.spec, "shape": summary.input_shape}
    dataset.status, dataset.error = "ready", None
    dataset.artifact, dataset.bytes = published.name, published.bytes
    dataset.sha256, dataset.num_examples = summary.sha256, summary.num_examples
    dataset.num_classes, dataset.target_type = summary.num_classes, summary.target_type
    dataset.columns, dataset.input_shape = summary.columns, summary.input_shape


async def fail_import(session: AsyncSession, dataset_id: str, error: dict[str, Any]) -> None:
    """Record why an import failed."""
    dataset = await find(session, dataset_id, lock=True)
    dataset.status, dataset.error = "failed", error


async def begin_import(session: AsyncSession, job: Job) -> None:
    """Record that a data set is being imported again."""
    dataset = await find(session, job.resource_id, lock=True)
    dataset.status, dataset.error = "importing", None


async def needed_uploads(session: AsyncSession, names: Sequence[str]) -> set[str]:
    """Return which uploaded files are still to be imported, perhaps by a retry."""
    return await repository.needed_uploads(session, names)


async def named_artifacts(session: AsyncSession, names: Sequence[str]) -> set[str]:
    """Return which artifacts are data sets', also of those that are being imported."""
    ids = {name.rpartition("/")[2]: name for name in names}
    return {ids[found] for found in await repository.existing(session, list(ids))}


def spec_of(dataset: Dataset) -> DatasetSpec:
    """Return how a data set's values are read."""
    return DatasetSpec.model_validate(dataset.spec)


def dataset_ref(dataset: Dataset, artifacts: ArtifactStore, like: Dataset | None = None) -> DatasetRef:
    """Return where an imported data set is; with `like`, its values are prepared as that training set's are."""
    assert dataset.artifact is not None
    spec = spec_of(dataset)
    if like is not None:
        spec = spec.model_copy(update={key: like.spec[key] for key in ("normalize", "max_length")})
    return DatasetRef(
        id=dataset.id,
        folder=artifacts.open(dataset.artifact),
        spec=spec,
        sha256=dataset.sha256 or "",
        num_examples=dataset.num_examples or 0,
    )


def reader_of(artifacts: ArtifactStore, dataset: Dataset) -> DatasetReader:
    """Return a reader of a ready data set; readers are kept until a data set is deleted."""
    assert dataset.artifact is not None
    return _reader(artifacts.open(dataset.artifact), spec_of(dataset).model_dump_json())


async def shown(session: AsyncSession, dataset: Dataset) -> DatasetOut:
    """Return a data set as clients see it."""
    return _shown(dataset, (await repository.deleted_counts(session, [dataset.id])).get(dataset.id, 0))


def _shown(dataset: Dataset, deleted: int) -> DatasetOut:
    return DatasetOut(
        id=dataset.id,
        name=dataset.name,
        status=dataset.status,
        kind=dataset.spec["kind"],
        spec=dataset.spec,
        sha256=dataset.sha256,
        num_examples=dataset.num_examples,
        num_classes=dataset.num_classes,
        target_type=dataset.target_type,
        input_shape=dataset.input_shape,
        columns=None if dataset.columns is None else [Column(**column) for column in dataset.columns],
        bytes=dataset.bytes,
        version=dataset.version,
        parent=dataset.parent_id,
        deleted=deleted,
        job=dataset.job_id,
        error=dataset.error,
        created_at=dataset.created_at,
    )


def preview_path(dataset_id: str, row: int) -> str:
    """Return where an example's preview is."""
    return f"/v1/datasets/{dataset_id}/examples/{row}/preview"


@contextlib.asynccontextmanager
async def unless_deleted(session: AsyncSession, dataset: Dataset) -> AsyncIterator[None]:
    """Say of files that cannot be read that their data set is gone, if it was deleted meanwhile.

    Raises:
        NotFound: if it was.
    """
    try:
        yield
    except (CorruptArtifactError, OSError):
        await find(session, dataset.id)
        raise


@lru_cache(maxsize=32)
def _reader(folder: Path, spec: str) -> DatasetReader:
    # Previews are of single rows: whole row groups of images must not stay.
    return DatasetReader(folder, DatasetSpec.model_validate_json(spec), keep_groups=False)


async def _finished(session: AsyncSession, dataset_id: str) -> DatasetOut:
    return await shown(session, await find(session, dataset_id))


jobs.SHOWN["import"] = _finished
jobs.RESOURCES["import"] = jobs.Resource(begin_import, fail_import)
