"""A diagonal plus few rows, solved in the space of the rows by one factorisation that all vectors share.

`(D + w GᵀG/n)⁻¹ v = D⁻¹ v - s D⁻¹ Gᵀ (1 + s G D⁻¹ Gᵀ)⁻¹ G D⁻¹ v` with `s = w/n`: two products with the rows G for each vector.

Source: Woodbury 1950.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.rows import PseudoRows

# The factorisation has half of this many rows squared: 32 MiB.
MAX_ROWS = 4096
# Multiplications of the rows' Gram matrix: half a minute.
MAX_WORK = 2e12


@dataclass(frozen=True)
class RowFactor:
    """The Cholesky factor of `1 + s G D⁻¹ Gᵀ`.

    Attributes:
        lower: (rows, rows).
        share: s.
        damping: with which D was made.
    """

    lower: Tensor
    share: float
    damping: float

    @classmethod
    def of(cls, rows: PseudoRows, diagonal: Sequence[Tensor], weight: float, damping: float) -> "RowFactor | None":
        """Return the factor; None where that would take too long, rows are more than parameters, or the damping is too little for the precision of numbers.

        Args:
            rows: G.
            diagonal: D, (groups, d_out, d_in) per block.
            weight: w.
            damping: with which D was made.
        """
        size, count = sum(part.numel() for part in diagonal), len(rows)
        if not 0 < count <= min(MAX_ROWS, size) or count**2 * size > MAX_WORK:
            return None
        if not all(bool((part > 0).all()) for part in diagonal):
            return None
        share = weight / rows.num_examples
        matrix = rows.gram(diagonal).double().mul_(share)
        matrix.diagonal().add_(1)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return None if failed else cls(lower.to(rows.dtype), share, damping)

    def solve(self, rows: PseudoRows, vectors: Sequence[Tensor], diagonal: Sequence[Tensor]) -> list[Tensor]:
        """Return the inverse times `v`, (vectors, groups, d_out, d_in) per block.

        Args:
            rows: G, the very rows that the factor is of.
            vectors: v.
            diagonal: D, (groups, d_out, d_in) per block.
        """
        divided = [part / divisor for part, divisor in zip(vectors, diagonal, strict=True)]
        weights = torch.cholesky_solve(rows.inner(divided), self.lower)
        moved = rows.combined(weights * self.share)
        return [part - other / divisor for part, other, divisor in zip(divided, moved, diagonal, strict=True)]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return it by name, its lower half alone."""
        half = self.lower[tuple(torch.tril_indices(*self.lower.shape))]
        return {"rows.lower": half.cpu().numpy(), "rows.scale": np.array([self.share, self.damping])}

    @staticmethod
    def damping_of(arrays: Mapping[str, np.ndarray]) -> float | None:
        """Return the damping of a stored factor, None if there is none."""
        return float(arrays["rows.scale"][1]) if "rows.scale" in arrays else None

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], device: str = "cpu") -> "RowFactor | None":
        """Return it from stored arrays, None if they have none."""
        half = arrays.get("rows.lower")
        if half is None:
            return None
        size = (int((8 * len(half) + 1) ** 0.5) - 1) // 2
        values = torch.from_numpy(half)
        lower = values.new_zeros(size, size)
        lower[tuple(torch.tril_indices(size, size))] = values
        share, damping = arrays["rows.scale"].tolist()
        return cls(lower.to(device), share, damping)
