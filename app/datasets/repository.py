"""Data sets in the database."""

from collections.abc import Sequence

from sqlalchemy import CTE, BigInteger, cast, func, literal, select
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.references import by_reference
from app.db.tables import Dataset, DeletedExample
from app.web.pagination import Page, newest_first


async def find(session: AsyncSession, reference: str, *, lock: bool = False, keep: bool = False) -> Dataset | None:
    """Return a data set by id or name."""
    query = by_reference(Dataset, reference, lock=lock, keep=keep)
    return (await session.execute(query)).scalar_one_or_none()


async def page(session: AsyncSession, page_: Page) -> Sequence[Dataset]:
    """Return data sets, newest first."""
    return (await session.execute(newest_first(select(Dataset), Dataset.id, page_, "datasets"))).scalars().all()


async def existing(session: AsyncSession, ids: Sequence[str]) -> Sequence[str]:
    """Return which of some ids data sets have."""
    return (await session.execute(select(Dataset.id).where(Dataset.id.in_(ids)))).scalars().all()


async def needed_uploads(session: AsyncSession, names: Sequence[str]) -> set[str]:
    """Return which uploaded files belong to data sets that are not imported."""
    query = select(Dataset.upload).where(Dataset.upload.in_(names), Dataset.status != "ready")
    return {name for name in (await session.execute(query)).scalars() if name is not None}


def _lineages(ids: Sequence[str]) -> CTE:
    """Every given data set with each version that it was made from, itself included."""
    own = select(Dataset.id.label("of"), Dataset.id.label("id"), Dataset.parent_id).where(Dataset.id.in_(ids))
    found = own.cte("lineage", recursive=True)
    before = select(found.c.of, Dataset.id, Dataset.parent_id).join(Dataset, Dataset.id == found.c.parent_id)
    return found.union_all(before)


async def lineage(session: AsyncSession, dataset: Dataset, *, lock: bool = False) -> Sequence[Dataset]:
    """Return a data set and the versions that it was made from, the first version first."""
    ids = select(_lineages([dataset.id]).c.id)
    query = select(Dataset).where(Dataset.id.in_(ids)).order_by(Dataset.version)
    return (await session.execute(query.with_for_update(key_share=True) if lock else query)).scalars().all()


async def deleted_rows(session: AsyncSession, dataset_id: str) -> list[int]:
    """Return the deleted rows of a data set, ascending."""
    ids = select(_lineages([dataset_id]).c.id)
    query = select(DeletedExample.row).where(DeletedExample.dataset_id.in_(ids)).order_by(DeletedExample.row)
    return list((await session.execute(query)).scalars().all())


async def deleted_counts(session: AsyncSession, ids: Sequence[str]) -> dict[str, int]:
    """Return how many rows of each data set are deleted, for those where some are."""
    found = _lineages(ids)
    query = select(found.c.of, func.count()).join(DeletedExample, DeletedExample.dataset_id == found.c.id)
    return dict((await session.execute(query.group_by(found.c.of))).tuples().all())


async def add_deleted(session: AsyncSession, dataset_id: str, rows: Sequence[int]) -> int:
    """Record rows as deleted; returns how many were not yet."""
    if not rows:
        return 0
    values = func.unnest(cast(list(rows), ARRAY(BigInteger))).column_valued("row")
    statement = insert(DeletedExample).from_select(["dataset_id", "row"], select(literal(dataset_id), values))
    added = await session.execute(statement.on_conflict_do_nothing().returning(DeletedExample.row))
    return len(added.scalars().all())
