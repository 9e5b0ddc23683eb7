"""Training examples that leave together, and what their curvature is made from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from attribution_core.curvature.draws import Draws
from attribution_core.data.batch import Batch


@dataclass(frozen=True)
class Group:
    """A group F of training examples under one checkpoint.

    Attributes:
        rows: row numbers, (|F|,).
        num_examples: n, of the whole training set.
        weights: what each row's inner products are multiplied with, (|F|,).
        batches: yields the examples, in the order of `rows`.
        draws: yields their pseudo-gradients as the fit drew them.
    """

    rows: np.ndarray
    num_examples: int
    weights: np.ndarray
    batches: Callable[[], Iterator[Batch]]
    draws: Callable[[], Iterator[Draws]]
