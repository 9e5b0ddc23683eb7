"""A training seen through its checkpoints, cut into segments; free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attribution_core.errors import InvalidInputError


@dataclass(frozen=True)
class Point:
    """One checkpoint of a run.

    Attributes:
        number: its place in the fit's list.
        step: optimizer steps before it.
        learning_rate: of the last of them, taken for all since the checkpoint before.
    """

    number: int
    step: int
    learning_rate: float


@dataclass(frozen=True)
class Segment:
    """Consecutive checkpoints of a run over which its gradients and curvature are taken to be constant.

    Attributes:
        checkpoints: their places in the fit's list, by step.
        time: `η̄ K`, the learning rate summed over the segment's steps.
    """

    checkpoints: tuple[int, ...]
    time: float


def segments(run: Sequence[Point], asked: int | Literal["learning_rate"]) -> list[Segment]:
    """Cut a run, which begins at step 0, into so many segments of about as many checkpoints each, or wherever the learning rate changes.

    Raises:
        InvalidInputError: if the run has fewer checkpoints than segments are asked for.
    """
    if asked == "learning_rate":
        changes = [place for place in range(1, len(run)) if run[place].learning_rate != run[place - 1].learning_rate]
        parts = np.split(np.arange(len(run)), changes)
    elif len(run) < asked:
        raise InvalidInputError(
            f"{asked} segments take as many checkpoints of each run, and one has {len(run)}: ask for fewer, or give all checkpoints",
            "/checkpoints",
        )
    else:
        parts = np.array_split(np.arange(len(run)), asked)
    before = [0, *(point.step for point in run)]
    times = [point.learning_rate * (point.step - before[place]) for place, point in enumerate(run)]
    return [
        Segment(tuple(run[place].number for place in part), float(sum(times[place] for place in part)))
        for part in parts
    ]
