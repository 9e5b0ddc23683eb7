"""Indexes in the database."""

from collections.abc import Sequence

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import Index
from app.web.pagination import Page, newest_first


async def find(session: AsyncSession, reference: str, *, lock: bool = False) -> Index | None:
    """Return an index by id or name."""
    query = select(Index).where(or_(Index.id == reference, Index.name == reference))
    return (await session.execute(query.with_for_update() if lock else query)).scalar_one_or_none()


async def page(session: AsyncSession, page_: Page) -> Sequence[Index]:
    """Return indexes, newest first."""
    return (await session.execute(newest_first(select(Index), Index.id, page_, "indexes"))).scalars().all()
