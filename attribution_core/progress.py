"""How long-running work reports progress and learns that it should stop."""

from typing import Protocol


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
