"""Banks in the database."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import Bank, BankGroup
from app.web.pagination import Page, newest_first


async def bank_of_key(session: AsyncSession, key: str, values: dict[str, Any]) -> Bank:
    """Return the bank of a key, made from `values` if there is none; it is kept from being deleted until the transaction ends."""
    kept = select(Bank).where(Bank.key == key).with_for_update(read=True, key_share=True)
    while (found := (await session.execute(kept)).scalar_one_or_none()) is None:
        await session.execute(insert(Bank).values(key=key, **values).on_conflict_do_nothing(index_elements=[Bank.key]))
    return found


async def existing_bank(session: AsyncSession, key: str) -> Bank | None:
    """Return the bank of a key if there is one."""
    return (await session.execute(select(Bank).where(Bank.key == key))).scalar_one_or_none()


async def bank(session: AsyncSession, bank_id: str) -> Bank | None:
    """Return a bank."""
    return (await session.execute(select(Bank).where(Bank.id == bank_id))).scalar_one_or_none()


async def banks(session: AsyncSession, page_: Page) -> Sequence[Bank]:
    """Return banks, newest first."""
    return (await session.execute(newest_first(select(Bank), Bank.id, page_, "banks"))).scalars().all()


async def groups(session: AsyncSession, bank_id: str) -> dict[int, str]:
    """Return the artifact of each group of a bank that was retrained."""
    found = await session.execute(select(BankGroup.ordinal, BankGroup.artifact).where(BankGroup.bank_id == bank_id))
    return {int(ordinal): artifact for ordinal, artifact in found}


async def named_artifacts(session: AsyncSession, names: Sequence[str]) -> set[str]:
    """Return which artifacts some group names."""
    return set((await session.execute(select(BankGroup.artifact).where(BankGroup.artifact.in_(names)))).scalars())


async def totals(session: AsyncSession, bank_ids: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Return each bank's retrainings, how many of them diverged, and bytes."""
    sums = (func.sum(column) for column in (BankGroup.retrainings, BankGroup.diverged, BankGroup.bytes))
    query = select(BankGroup.bank_id, *sums).where(BankGroup.bank_id.in_(bank_ids)).group_by(BankGroup.bank_id)
    return {row[0]: (int(row[1]), int(row[2]), int(row[3])) for row in await session.execute(query)}


async def add_group(session: AsyncSession, values: dict[str, Any]) -> None:
    """Record a retrained group; another evaluation may have recorded the same one."""
    await session.execute(insert(BankGroup).values(**values).on_conflict_do_nothing())


async def lock_bank(session: AsyncSession, bank_id: str, *, deleting: bool = False) -> Bank | None:
    """Return a bank, kept from being deleted until the transaction ends, or from being read by whoever wants it kept."""
    query = select(Bank).where(Bank.id == bank_id).with_for_update(read=not deleting)
    return (await session.execute(query)).scalar_one_or_none()
