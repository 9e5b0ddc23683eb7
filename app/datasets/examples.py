"""Looking at a data set's examples, and deleting some."""

import asyncio
import json
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets import repository
from app.datasets import service as datasets
from app.datasets.previews import Preview, preview_of
from app.datasets.schemas import DeletionOut, ExampleOut
from app.db.tables import Dataset
from app.errors import Gone, InvalidRequest, NotFound
from app.storage.artifacts import ArtifactStore
from app.web.pagination import Page, PageOf, next_cursor
from app.web.strict_json import parse_strictly
from attribution_core.data.reader import DatasetReader
from attribution_core.errors import InvalidInputError, located
from attribution_core.fingerprint import sha256_of
from attribution_core.spec import Filter, Selector, check_filter_size

_FILTER: TypeAdapter[Filter] = TypeAdapter(Filter)


async def delete_examples(
    session: AsyncSession, artifacts: ArtifactStore, reference: str, selector: Selector
) -> DeletionOut:
    """Make examples disappear from every answer; a repeated deletion changes nothing.

    A row belongs to the version that brought it, so it is gone from all versions that hold it.

    Raises:
        NotFound: if there is no such data set.
        NotReady: if it is not imported.
        InvalidRequest: if a row does not exist, or none would be left.
    """
    dataset = await datasets.find_ready(session, reference)
    versions = await repository.lineage(session, dataset, lock=True)
    before = await datasets.deleted_rows(session, dataset.id)
    rows = await asyncio.to_thread(_selected, datasets.reader_of(artifacts, dataset), selector)
    if len(np.union1d(rows, before)) == dataset.num_examples:
        raise InvalidRequest("No example would be left.", pointer="/selector")
    count, start = 0, 0
    for version in versions:
        stop = version.num_examples or 0
        own = rows[(rows >= start) & (rows < stop)]
        count, start = count + await repository.add_deleted(session, version.id, own.tolist()), stop
    return DeletionOut(dataset=dataset.id, deleted=count, total=len(before) + count)


async def examples(
    session: AsyncSession, artifacts: ArtifactStore, dataset: Dataset, page: Page, condition: str | None
) -> PageOf[ExampleOut]:
    """Return one page of examples by row, those that a filter selects; deleted ones are not there."""
    deleted = await datasets.deleted_rows(session, dataset.id)
    chosen = None if condition is None else parsed_filter(condition)
    # A filter may be longer than a cursor.
    route = f"examples:{dataset.id}:{sha256_of(condition)[:16]}"
    after = page.number_after(route)

    def read() -> tuple[list[dict[str, Any]], bool]:
        reader = datasets.reader_of(artifacts, dataset)
        with located("/query/filter"):
            rows = np.arange(reader.num_examples) if chosen is None else reader.matching(chosen)
        rows = np.setdiff1d(rows, deleted) if deleted else rows
        rows = rows if after is None else rows[rows > after]
        return reader.describe(rows[: page.limit]), len(rows) > page.limit

    async with datasets.unless_deleted(session, dataset):
        found, more = await asyncio.to_thread(read)
    following = next_cursor(route, found[-1]["row"]) if more else None
    return PageOf[ExampleOut](items=[_example(dataset, entry) for entry in found], next=following)


async def example(session: AsyncSession, artifacts: ArtifactStore, dataset: Dataset, row: int) -> ExampleOut:
    """Return one example.

    Raises:
        NotFound: if the row does not exist.
        Gone: if it was deleted.
    """
    async with datasets.unless_deleted(session, dataset):
        reader = await _with_row(session, artifacts, dataset, row)
        found = await asyncio.to_thread(lambda: reader.describe(np.array([row])))
    return _example(dataset, found[0])


async def preview(session: AsyncSession, artifacts: ArtifactStore, dataset: Dataset, row: int) -> Preview:
    """Return one example's input as a picture or text.

    Raises:
        NotFound: if the row does not exist.
        Gone: if it was deleted.
    """
    async with datasets.unless_deleted(session, dataset):
        reader = await _with_row(session, artifacts, dataset, row)
        return await asyncio.to_thread(lambda: preview_of(reader, row))


def parsed_filter(text: str) -> Filter:
    """Return a filter given as JSON text.

    Raises:
        InvalidRequest: if it is not one.
    """
    try:
        return check_filter_size(_FILTER.validate_python(parse_strictly(text.encode("utf-8", "surrogatepass"))))
    except (InvalidRequest, ValidationError, ValueError, RecursionError):
        example_ = json.dumps({"field": "label", "op": "eq", "value": 3})
        raise InvalidRequest(f"The filter is not one such as {example_}.", pointer="/query/filter") from None


def _selected(reader: DatasetReader, selector: Selector) -> np.ndarray:
    """Return the rows a selector names, ascending; also those that were deleted before."""
    try:
        if selector.ids is not None:
            return np.unique(reader.rows_of_ids(selector.ids))
        if selector.where is not None:
            return reader.matching(selector.where)
    except InvalidInputError as error:
        raise InvalidRequest(str(error), pointer="/selector") from None
    rows = np.unique(np.asarray(selector.rows or [], dtype=np.int64))
    if len(rows) and rows[-1] >= reader.num_examples:
        raise InvalidRequest(f"Row {rows[-1]} does not exist: there are {reader.num_examples}.", pointer="/selector")
    return rows


async def _with_row(session: AsyncSession, artifacts: ArtifactStore, dataset: Dataset, row: int) -> DatasetReader:
    reader = datasets.reader_of(artifacts, dataset)
    if not 0 <= row < reader.num_examples:
        raise NotFound(f"Data set {dataset.name!r} has no row {row}; it has {reader.num_examples}.")
    if row in await datasets.deleted_rows(session, dataset.id):
        raise Gone(f"Row {row} of data set {dataset.name!r} was deleted.")
    return reader


def _example(dataset: Dataset, entry: dict[str, Any]) -> ExampleOut:
    return ExampleOut(**entry, preview=datasets.preview_path(dataset.id, entry["row"]))
