"""Data sets in the database."""

from collections.abc import Sequence

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import Dataset
from app.web.pagination import Page, newest_first


async def find(session: AsyncSession, reference: str, *, lock: bool = False) -> Dataset | None:
    """Return a data set by id or name."""
    query = select(Dataset).where(or_(Dataset.id == reference, Dataset.name == reference))
    return (await session.execute(query.with_for_update() if lock else query)).scalar_one_or_none()


async def page(session: AsyncSession, page_: Page) -> Sequence[Dataset]:
    """Return data sets, newest first."""
    return (await session.execute(newest_first(select(Dataset), Dataset.id, page_, "datasets"))).scalars().all()
