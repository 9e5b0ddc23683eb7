"""Dense projections with independent entries; slower than the sparse one, with a slightly smaller variance."""

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from attribution_core.projection.base import Projection
from attribution_core.random_numbers import hashed, normal

_ENTRIES_AT_ONCE = 1 << 22


class DenseProjection(Projection):
    """Independent entries of variance 1/dim, generated a block of coordinates at a time and never kept."""

    generated = True

    def project_range(self, values: Tensor, start: int) -> Tensor:
        """Project the coordinates from `start` on."""
        projected = values.new_zeros(len(values), self.dim)
        step = max(1, _ENTRIES_AT_ONCE // self.dim)
        for first in range(0, values.shape[1], step):
            part = values[:, first : first + step]
            counters = np.arange((start + first) * self.dim, (start + first + part.shape[1]) * self.dim)
            entries = self._entries(counters).reshape(part.shape[1], self.dim) / self.dim**0.5
            projected += part @ torch.from_numpy(entries).to(values)
        return projected

    @abstractmethod
    def _entries(self, counters: np.ndarray) -> np.ndarray:
        """Return one entry of mean 0 and variance 1 per counter, float64."""


class RademacherProjection(DenseProjection):
    """Random signs. Source: Achlioptas 2003."""

    def _entries(self, counters: np.ndarray) -> np.ndarray:
        return (hashed(self.seed, counters) & np.uint64(1)) * 2.0 - 1.0


class GaussianProjection(DenseProjection):
    """Standard normal entries."""

    def _entries(self, counters: np.ndarray) -> np.ndarray:
        return normal(self.seed, counters)
