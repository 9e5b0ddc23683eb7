"""Rows by what a request calls them."""

from typing import TypeVar

from sqlalchemy import Select, or_, select

from app.db.tables import Dataset, Index, Model

T = TypeVar("T", Dataset, Index, Model)


def by_reference(table: type[T], reference: str, *, lock: bool = False, keep: bool = False) -> Select[T]:
    """Select the row of an id or a name; a name that is another row's id means that other row.

    Args:
        table: of the row.
        reference: its id or name.
        lock: have it for oneself until the transaction ends.
        keep: have nobody delete it until then.
    """
    named = or_(table.id == reference, table.name == reference)
    query = select(table).where(named).order_by((table.id == reference).desc()).limit(1)
    if keep:
        return query.with_for_update(read=True, key_share=True)
    return query.with_for_update() if lock else query
