"""Work divided into stages of shards, each a pure function of the work and of the stages before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from attribution_core.progress import Progress


class Piece(Protocol):
    """One shard of a stage.

    Attributes:
        ordinal: its number within the stage.
        units: how much of the job's progress it is.
    """

    @property
    def ordinal(self) -> int:
        """Its number within the stage."""

    @property
    def units(self) -> int:
        """How much of the job's progress it is."""


@dataclass(frozen=True)
class Shard:
    """Training examples number `start … stop - 1` under one checkpoint, every `step`-th of them; examples left out have no number."""

    ordinal: int
    checkpoint: int
    start: int
    stop: int
    step: int = 1

    @property
    def units(self) -> int:
        """Training examples in it."""
        return len(range(self.start, self.stop, self.step))


@dataclass(frozen=True)
class Stage:
    """Shards that can be computed in any order and placement."""

    name: str
    shards: Sequence[Piece]


class Pipeline(Protocol):
    """What a sharded job computes."""

    def stages(self) -> list[Stage]:
        """Return the stages in order."""

    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> dict[str, np.ndarray]:
        """Compute one shard; progress counts its units."""

    def reduce(self, stage: str, shard_files: Sequence[Path], progress: Progress) -> dict[str, np.ndarray]:
        """Combine a stage's shard files, given in order of their ordinals; progress counts nothing, but can stop it."""


def shard_ranges(total: int, size: int) -> list[tuple[int, int]]:
    """Split `range(total)` into consecutive `(start, stop)` ranges of at most `size` rows.

    The division depends on nothing but its arguments, so every worker agrees on it.

    Raises:
        ValueError: if `total` is negative or `size` is not positive.
    """
    if total < 0 or size < 1:
        raise ValueError(f"cannot split {total} rows into shards of {size}")
    return [(start, min(start + size, total)) for start in range(0, total, size)]
