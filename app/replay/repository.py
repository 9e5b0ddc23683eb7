"""Replays in the database."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import Replay
from app.web.pagination import Page, newest_first


async def find(session: AsyncSession, kind: str, replay_id: str, *, lock: bool = False) -> Replay | None:
    """Return a replay of a kind."""
    query = select(Replay).where(Replay.id == replay_id, Replay.kind == kind)
    return (await session.execute(query.with_for_update() if lock else query)).scalar_one_or_none()


async def page(session: AsyncSession, kind: str, page_: Page, route: str, **of: str) -> Sequence[Replay]:
    """Return replays of a kind and of an index or a model, newest first."""
    query = select(Replay).where(Replay.kind == kind, *(getattr(Replay, name) == value for name, value in of.items()))
    return (await session.execute(newest_first(query, Replay.id, page_, route))).scalars().all()
