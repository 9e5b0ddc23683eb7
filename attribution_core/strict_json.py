"""What `json.loads` lets through and JSON does not, or not with one meaning; both functions are hooks of it."""

from typing import Any


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, as an `object_pairs_hook`.

    Raises:
        ValueError: if a key occurs twice: which of its values is meant, readers disagree about.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def refuse_constant(name: str) -> Any:
    """Refuse NaN and infinities, as a `parse_constant`.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is not a JSON number")
