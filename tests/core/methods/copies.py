"""What tests of perturbed copies share: an index's scores, and what its fit chose by itself."""

from typing import Any

import numpy as np

from attribution_core.methods.loaded import LoadedIndex
from tests.core.methods.problems import N, Problem


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def scores(index: LoadedIndex, problem: Problem) -> np.ndarray:
    return index.scores(index.query(problem.queries(), None), np.arange(N), rescore=True)


def chosen(index: LoadedIndex) -> dict[str, Any]:
    """What copies have defaults of their own for, as an ensemble of checkpoints must be told it."""
    fields, defaults = type(index.spec.method).model_fields, index.context.defaults
    found: dict[str, Any] = {}
    if "residual_power" in fields:
        found["residual_power"] = defaults.residual_power
    if "shrinkage" in fields:
        found |= {"shrinkage": defaults.shrinkage, "damping": index.default_damping}
    return found
