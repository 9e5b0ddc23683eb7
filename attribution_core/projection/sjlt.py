"""Sparse Johnson-Lindenstrauss transform: every coordinate goes to one bucket, with a random sign.

Source: Kane & Nelson 2014, Sparser Johnson-Lindenstrauss Transforms (one non-zero per column: the count sketch).
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from attribution_core.projection.base import Projection
from attribution_core.random_numbers import hashed


class SparseProjection(Projection):
    """A sparse sign matrix with one non-zero per coordinate, kept as its two integer tables."""

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__(dim, seed)
        self._cache: dict[tuple[object, ...], Tensor] = {}

    def project_range(self, values: Tensor, start: int) -> Tensor:
        """Project the coordinates from `start` on."""
        # A sparse product is deterministic, and several times faster than scattered additions for usual batches.
        return (self._sparse(start, values.shape[1], values) @ values.T).T

    def _sparse(self, start: int, size: int, like: Tensor) -> Tensor:
        """Return coordinates `start … start + size - 1` as a sparse (dim, size) matrix on `like`'s device."""
        key = (start, size, like.dtype, like.device)
        if key not in self._cache:
            buckets, signs = self.tables(start, size)
            order = np.argsort(buckets, kind="stable")
            rows = np.concatenate([[0], np.bincount(buckets, minlength=self.dim).cumsum()])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                self._cache[key] = torch.sparse_csr_tensor(
                    torch.from_numpy(rows),
                    torch.from_numpy(order),
                    torch.from_numpy(signs[order]).to(like.dtype),
                    (self.dim, size),
                    device=like.device,
                    check_invariants=False,
                )
        return self._cache[key]

    def tables(self, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bucket (int64) and the sign (±1) of each coordinate of a range."""
        bits = hashed(self.seed, np.arange(start, start + size))
        return ((bits >> np.uint64(1)) % np.uint64(self.dim)).astype(np.int64), (bits & np.uint64(1)) * 2.0 - 1.0
