"""Replays in the database."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, cast, false, func, or_, select
from sqlalchemy.dialects.postgresql import JSONB, JSONPATH
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.base import Base
from app.db.tables import Bank, Dataset, Index, Model, Replay
from app.web.pagination import Page, newest_first


async def find(session: AsyncSession, kind: str, replay_id: str, *, lock: bool = False) -> Replay | None:
    """Return a replay of a kind."""
    query = select(Replay).where(Replay.id == replay_id, Replay.kind == kind)
    return (await session.execute(query.with_for_update() if lock else query)).scalar_one_or_none()


async def page(session: AsyncSession, kind: str, page_: Page, route: str, **of: str) -> Sequence[Replay]:
    """Return replays of a kind and of an index or a model, newest first."""
    query = select(Replay).where(Replay.kind == kind, *(getattr(Replay, name) == value for name, value in of.items()))
    return (await session.execute(newest_first(query, Replay.id, page_, route))).scalars().all()


async def jobs_needing(session: AsyncSession, thing: Base) -> Sequence[str]:
    """Return the jobs of running replays that read a model, a data set, an index or a bank, whether by column or in what was asked."""
    query = select(Replay.job_id).where(Replay.status == "running", Replay.job_id.is_not(None), _reads(thing))
    return [job_id for job_id in (await session.execute(query)).scalars() if job_id is not None]


def _reads(thing: Base) -> ColumnElement[bool]:
    match thing:
        case Model():
            return Replay.model_id == thing.id
        case Dataset():
            return or_(Replay.dataset_id == thing.id, _names(thing, "$.**.dataset"))
        case Index():
            return or_(Replay.index_id == thing.id, _names(thing, "$.tune.candidates[*]"))
        case Bank():
            same = (Replay.model_id == thing.model_id, Replay.dataset_id == thing.dataset_id)
            return and_(Replay.kind == "evaluation", *same)
    return false()


def _names(thing: Dataset | Index, path: str) -> ColumnElement[bool]:
    """Whether what was asked has an id or a name in a place."""
    values = cast({"id": thing.id, "name": thing.name}, JSONB)
    return func.jsonb_path_exists(Replay.request, cast(f"{path} ? (@ == $id || @ == $name)", JSONPATH), values)
