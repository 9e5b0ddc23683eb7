"""JSON pointers (RFC 6901) into what a caller sent.

The places that pydantic reports hold names of its own as well: the tag or class of the union's branch that was tried, the
validator that a value went through. None of these is in the caller's document, so a pointer is found by walking that document.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_NAME = 256
Step = int | str


def pointer_to(steps: Iterable[Step]) -> str:
    """Return the pointer that goes these steps down; it stops above a name longer than 256 characters, which it would repeat."""
    pointer = ""
    for step in steps:
        name = str(step)
        if len(name) > MAX_NAME:
            break
        pointer += "/" + name.replace("~", "~0").replace("/", "~1")
    return pointer


def steps_into(document: object, error: Mapping[str, Any]) -> tuple[Step, ...]:
    """Return the steps to the place in `document` that one of pydantic's errors is about.

    Every step but the last of a field that is missing is there. A name can be both a union's tag and a field of what was sent;
    the error's own `input`, the value it complains of, tells which was meant.

    Args:
        document: what was validated.
        error: an entry of `ValidationError.errors()`; its `loc` counted from `document`.
    """
    missing = error["type"] == "missing"
    location = error["loc"][:-1] if missing else error["loc"]
    reached: dict[tuple[Step, ...], object] = {(): document}  # every way to leave steps out such that the rest is there
    for step in location:
        further = {(*path, step): value[step] for path, value in reached.items() if _has(value, step)}  # type: ignore[index]
        reached |= further
    meant = [path for path, value in reached.items() if value is error.get("input")] or list(reached)
    deepest = max(meant, key=len)
    return (*deepest, *error["loc"][-1:]) if missing else deepest


def _has(value: object, step: Step) -> bool:
    match value:
        case Mapping():
            return step in value
        case str() | bytes():
            return False
        case Sequence():
            return isinstance(step, int) and 0 <= step < len(value)
        case _:
            return False
