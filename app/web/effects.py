"""Effects on files that belong to a request's transaction: done after its commit, or undone if there is none."""

from collections.abc import Callable

from fastapi import Request


def undo_on_error(request: Request, undo: Callable[[], None]) -> None:
    """Call `undo` if the request's transaction does not commit."""
    _listed(request, "undo").append(undo)


def after_commit(request: Request, effect: Callable[[], None]) -> None:
    """Call `effect` once the request's transaction has committed."""
    _listed(request, "after_commit").append(effect)


def _listed(request: Request, name: str) -> list[Callable[[], None]]:
    if not hasattr(request.state, name):
        setattr(request.state, name, [])
    found: list[Callable[[], None]] = getattr(request.state, name)
    return found
