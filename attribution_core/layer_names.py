"""Layers chosen by name or pattern; free of torch, so that a request is checked where it arrives.

A pattern is a name in which `*` stands for any characters, `?` for one and `[…]` for one of a set. One that starts with `!` takes away
from what the others chose; where all do, they take away from all layers.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

_WILD = frozenset("*?[")


def chosen_layers(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """Return the names that the patterns choose."""
    known = list(names)
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    chosen = {name for name in known if not wanted or _matches(wanted, name)}
    return {name for name in chosen if not _matches(unwanted, name)}


def unmatched_layers(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the patterns, without their `!`, that match no name."""
    known = list(names)
    bare = [pattern.removeprefix("!") for pattern in patterns]
    return [pattern for pattern in bare if not any(_matches([pattern], name) for name in known)]


def is_exact(pattern: str) -> bool:
    """Return whether a pattern names one layer and means it."""
    return not pattern.startswith("!") and not _WILD.intersection(pattern)


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(pattern == name or fnmatchcase(name, pattern) for pattern in patterns)
