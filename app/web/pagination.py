"""Keyset pages: `{"items": […], "next": cursor|null}`, stable while rows are added."""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, Field
from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute

from app.errors import InvalidCursor

MAX_LIMIT = 200
T = TypeVar("T")
S = TypeVar("S", bound=Select[Any])


class PageOf(BaseModel, Generic[T]):
    """One page of a list."""

    items: list[T]
    next: Annotated[str | None, Field(description="Cursor of the following page; null on the last.")]


@dataclass(frozen=True)
class Page:
    """What page of a list is asked for."""

    limit: int
    cursor: str | None

    def after(self, route: str) -> Any:
        """Return the position to go on from, None for the first page.

        Raises:
            InvalidCursor: if the cursor is not one that `next_cursor` made for the same list.
        """
        if self.cursor is None:
            return None
        try:
            padded = self.cursor.encode("ascii") + b"=" * (-len(self.cursor) % 4)
            found = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        except (ValueError, binascii.Error, RecursionError):
            raise InvalidCursor("The cursor is not one of this service.", pointer="/query/cursor") from None
        if not (isinstance(found, list) and len(found) == 2 and found[0] == route and type(found[1]) in (str, int)):
            raise InvalidCursor("The cursor belongs to another list.", pointer="/query/cursor")
        if isinstance(found[1], str) and (len(found[1]) > 64 or not found[1].isascii() or not found[1].isprintable()):
            raise InvalidCursor("The cursor is not one of this service.", pointer="/query/cursor")
        if isinstance(found[1], int) and not 0 <= found[1] < 2**53:
            raise InvalidCursor("The cursor is not one of this service.", pointer="/query/cursor")
        return found[1]

    def text_after(self, route: str) -> str | None:
        """Return the id to go on from."""
        found = self.after(route)
        if isinstance(found, int):
            raise InvalidCursor("The cursor belongs to another list.", pointer="/query/cursor")
        return found  # type: ignore[no-any-return]

    def number_after(self, route: str) -> int | None:
        """Return the number to go on from."""
        found = self.after(route)
        if isinstance(found, str):
            raise InvalidCursor("The cursor belongs to another list.", pointer="/query/cursor")
        return found  # type: ignore[no-any-return]


def next_cursor(route: str, position: str | int) -> str:
    """Return the cursor of what follows a position."""
    return base64.urlsafe_b64encode(json.dumps([route, position]).encode()).decode().rstrip("=")


def newest_first(query: S, column: InstrumentedAttribute[str], page: Page, route: str) -> S:
    """Restrict a query to one page by descending id, with one row more to know whether another page follows."""
    after = page.text_after(route)
    if after is not None:
        query = query.where(column < after)
    return query.order_by(column.desc()).limit(page.limit + 1)


def cut(rows: Sequence[T], page: Page, route: str) -> tuple[Sequence[T], str | None]:
    """Return a page's rows and the cursor of the next; rows carry an `id`."""
    if len(rows) <= page.limit:
        return rows, None
    kept = rows[: page.limit]
    return kept, next_cursor(route, kept[-1].id)  # type: ignore[attr-defined]
