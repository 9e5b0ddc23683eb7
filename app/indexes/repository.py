"""Indexes in the database."""

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.references import by_reference
from app.db.tables import Index, IndexGeneration, IndexPrior
from app.web.pagination import Page, newest_first


async def find(session: AsyncSession, reference: str, *, lock: bool = False, keep: bool = False) -> Index | None:
    """Return an index by id or name."""
    query = by_reference(Index, reference, lock=lock, keep=keep)
    return (await session.execute(query)).scalar_one_or_none()


async def page(session: AsyncSession, page_: Page) -> Sequence[Index]:
    """Return indexes, newest first."""
    return (await session.execute(newest_first(select(Index), Index.id, page_, "indexes"))).scalars().all()


async def generation(session: AsyncSession, index_id: str, number: int) -> IndexGeneration | None:
    """Return one generation of an index; None if they were deleted together."""
    query = select(IndexGeneration).where(IndexGeneration.index_id == index_id, IndexGeneration.number == number)
    return (await session.execute(query)).scalar_one_or_none()


async def generation_of_job(session: AsyncSession, job_id: str) -> IndexGeneration | None:
    """Return the generation that a job makes; None if it was given up."""
    query = select(IndexGeneration).where(IndexGeneration.job_id == job_id)
    return (await session.execute(query)).scalar_one_or_none()


async def generation_numbers(session: AsyncSession, index_id: str) -> Sequence[int]:
    """Return the numbers of an index's generations, ascending."""
    query = select(IndexGeneration.number).where(IndexGeneration.index_id == index_id)
    return (await session.execute(query.order_by(IndexGeneration.number))).scalars().all()


async def generations(session: AsyncSession, index_ids: Sequence[str]) -> Sequence[tuple[str, int]]:
    """Return the generations of some indexes, each as its index's id and its number."""
    query = select(IndexGeneration.index_id, IndexGeneration.number).where(IndexGeneration.index_id.in_(index_ids))
    return [(index_id, int(number)) for index_id, number in await session.execute(query)]


async def is_prior(session: AsyncSession, index_id: str) -> bool:
    """Return whether another index is built on this one."""
    query = select(IndexPrior.index_id).where(IndexPrior.prior_id == index_id).limit(1)
    return (await session.execute(query)).scalar() is not None


async def drop_generations(session: AsyncSession, index_id: str, before: int) -> Sequence[int]:
    """Forget the generations before one; returns their numbers."""
    dropped = await session.execute(
        delete(IndexGeneration)
        .where(IndexGeneration.index_id == index_id, IndexGeneration.number < before)
        .returning(IndexGeneration.number)
    )
    return dropped.scalars().all()
