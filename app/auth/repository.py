"""API keys in the database."""

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import ApiKey


async def any_key(session: AsyncSession) -> bool:
    """Return whether any key was ever made; revoking the last one does not open the service."""
    return bool((await session.execute(select(ApiKey.id).limit(1))).scalar())


async def key_by_id(session: AsyncSession, key_id: str) -> ApiKey | None:
    """Return a key that is not revoked."""
    query = select(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
    return (await session.execute(query)).scalar_one_or_none()


async def key_by_name(session: AsyncSession, name: str) -> ApiKey | None:
    """Return a key by its name, revoked or not."""
    return (await session.execute(select(ApiKey).where(ApiKey.name == name))).scalar_one_or_none()


async def all_keys(session: AsyncSession) -> list[ApiKey]:
    """Return every key, oldest first."""
    return list((await session.execute(select(ApiKey).order_by(ApiKey.id))).scalars())


async def revoke(session: AsyncSession, name: str) -> bool:
    """Revoke a key; returns whether there was one to revoke."""
    changed = await session.execute(
        update(ApiKey)
        .where(ApiKey.name == name, ApiKey.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .returning(ApiKey.id)
    )
    return changed.scalar() is not None
