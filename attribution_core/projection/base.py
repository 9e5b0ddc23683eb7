"""What every projection shares: the sum over blocks of coordinates.

Entry (i, j) of a projection is a pure function of (seed, i, j), so a projection is the same on every machine, for any
batch size, and no matrix needs to be stored beside an index. `method_spec.PROJECTION_VERSION` is part of every fingerprint.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from attribution_core.gradients.factors import LayerGradient, Turn, coordinates


class Projection(ABC):
    """A linear map from any number of coordinates to `dim`.

    Attributes:
        generated: entries are made anew for every product, so that few of many rows are cheaper than many of few.

    Args:
        dim: numbers kept.
        seed: chooses the map.
    """

    generated: ClassVar[bool] = False

    def __init__(self, dim: int, seed: int) -> None:
        self.dim = dim
        self.seed = seed

    def project(self, parts: Iterable[Tensor]) -> Tensor:
        """Project vectors given as consecutive parts, each (batch, numel) and at least one, to (batch, dim); parts are asked for one by one."""
        projected, start = torch.zeros(()), 0
        for part in parts:
            flat = part.flatten(1)
            projected = self.project_range(flat, start) + projected.to(flat)
            start += flat.shape[1]
        return projected

    def project_gradients(self, gradients: Sequence[LayerGradient], turns: Sequence[Turn] | None = None) -> Tensor:
        """Project per-example gradients, one entry per block, to (batch, dim), in other bases if given; a few are formed at a time."""
        projected = gradients[0].inputs.new_zeros(len(gradients[0]), self.dim)
        for part, start, values in coordinates(gradients, turns, together=not self.generated):
            projected[part] += self.project_range(values, start)
        return projected

    @abstractmethod
    def project_range(self, values: Tensor, start: int) -> Tensor:
        """Project `values` (batch, m), the coordinates `start … start + m - 1`, to (batch, dim)."""

    def matrix(self, num_coordinates: int) -> Tensor:
        """Return the map as an explicit float64 matrix (num_coordinates, dim); for tests and small checks."""
        return self.project([torch.eye(num_coordinates, dtype=torch.float64)])
