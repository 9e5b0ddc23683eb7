"""Models and checkpoints in the database."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.references import by_reference
from app.db.tables import Checkpoint, Model
from app.web.pagination import Page, newest_first


async def find(session: AsyncSession, reference: str, *, lock: bool = False, keep: bool = False) -> Model | None:
    """Return a model by id or name."""
    query = by_reference(Model, reference, lock=lock, keep=keep)
    return (await session.execute(query)).scalar_one_or_none()


async def page(session: AsyncSession, page_: Page) -> Sequence[Model]:
    """Return models, newest first."""
    return (await session.execute(newest_first(select(Model), Model.id, page_, "models"))).scalars().all()


async def checkpoint_page(session: AsyncSession, model_id: str, page_: Page, route: str) -> Sequence[Checkpoint]:
    """Return a model's checkpoints, newest first."""
    query = select(Checkpoint).where(Checkpoint.model_id == model_id)
    return (await session.execute(newest_first(query, Checkpoint.id, page_, route))).scalars().all()


async def checkpoint(session: AsyncSession, model_id: str, checkpoint_id: str) -> Checkpoint | None:
    """Return one checkpoint of a model."""
    query = select(Checkpoint).where(Checkpoint.model_id == model_id, Checkpoint.id == checkpoint_id)
    return (await session.execute(query)).scalar_one_or_none()


async def any_checkpoint(session: AsyncSession, checkpoint_id: str) -> Checkpoint | None:
    """Return a checkpoint of whatever model."""
    return (await session.execute(select(Checkpoint).where(Checkpoint.id == checkpoint_id))).scalar_one_or_none()


async def named_artifacts(session: AsyncSession, names: Sequence[str]) -> set[str]:
    """Return which artifacts some checkpoint names."""
    query = select(Checkpoint.artifact).where(Checkpoint.artifact.in_(names))
    return set((await session.execute(query)).scalars())


async def runs(session: AsyncSession, model_id: str) -> set[str]:
    """Return the runs that a model has checkpoints of."""
    query = select(Checkpoint.run).where(Checkpoint.model_id == model_id).distinct()
    return set((await session.execute(query)).scalars())


async def checkpoints(session: AsyncSession, model_id: str) -> Sequence[Checkpoint]:
    """Return all of a model's checkpoints, by run and step."""
    query = select(Checkpoint).where(Checkpoint.model_id == model_id).order_by(Checkpoint.run, Checkpoint.step)
    return (await session.execute(query)).scalars().all()


async def recipe_starting_from(session: AsyncSession, model_id: str) -> str | None:
    """Return the name of another model whose recipe starts from a checkpoint of this one, None if there is none."""
    own = select(Checkpoint.id).where(Checkpoint.model_id == model_id)
    start = Model.recipe["initialisation"]["checkpoint"].astext
    query = select(Model.name).where(Model.id != model_id, start.in_(own)).order_by(Model.id).limit(1)
    return (await session.execute(query)).scalar_one_or_none()
