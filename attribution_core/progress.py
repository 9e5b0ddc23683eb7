"""How long-running work reports progress and learns that it should stop."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Receives progress from a computation."""

    def advance(self, done: int) -> None:
        """Report that `done` more units were finished.

        Raises:
            Cancelled: if the work should stop now; nothing it wrote may become visible.
        """


class NoProgress:
    """Ignores reports; for notebooks and tests."""

    def advance(self, done: int) -> None:
        """Do nothing with `done`."""


def watched(items: Iterable[T], progress: Progress) -> Iterator[T]:
    """Yield items that are no units of progress; before each of them, and after the last, the work can be stopped.

    Raises:
        Cancelled: if it should stop now.
    """
    for item in items:
        progress.advance(0)
        yield item
    progress.advance(0)
