"""Projection of each layer's input and output gradient apart: `P_Gᵀ (Σ_t g_t a_tᵀ) P_A`, without ever forming the gradient.

Entries of both matrices are random signs. Inner products are kept in expectation, as the sides are independent; their variance is larger than
that of a projection of the whole gradient where examples share an input or an output direction.

Source: Choe et al. 2024, section 3 (LoGra), with random sides.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from attribution_core.gradients import Block, LayerGradient
from attribution_core.gradients.factors import Turn
from attribution_core.projection.base import Projection
from attribution_core.projection.sjlt import SparseProjection
from attribution_core.random_numbers import hashed


@dataclass(frozen=True)
class _Sides:
    """The two matrices of one block; a side of None keeps its coordinates."""

    inputs: Tensor | None
    outputs: Tensor | None
    size: int


class FactoredProjection(Projection):
    """Two sign matrices per block; blocks of several groups, and those that are small, go through a sparse projection or stay whole.

    Args:
        dim: numbers kept of all blocks together, divided evenly; rounding keeps fewer.
        seed: chooses the map.
        blocks: the layers.
    """

    def __init__(self, dim: int, seed: int, blocks: Sequence[Block]) -> None:
        self._blocks = list(blocks)
        self._share = max(1, dim // len(self._blocks))
        self._sides = [self._sides_of(number) for number in range(len(self._blocks))]
        super().__init__(sum(side.size for side in self._sides), seed)
        self._tables = [self._matrices(number, seed) for number in range(len(self._blocks))]

    @property
    def slices(self) -> list[slice]:
        """Where each block's numbers are in a row."""
        ends = np.cumsum([0, *(side.size for side in self._sides)])
        return [slice(int(start), int(stop)) for start, stop in pairwise(ends)]

    def project(self, parts: Iterable[Tensor]) -> Tensor:
        """Project matrices (batch, groups, d_out, d_in), one tensor per block, to (batch, dim)."""
        return torch.cat([self._project_matrices(number, part) for number, part in enumerate(parts)], dim=1)

    def project_gradients(self, gradients: Sequence[LayerGradient], turns: Sequence[Turn] | None = None) -> Tensor:
        """Project per-example gradients to (batch, dim) from their factors, in their own basis only."""
        assert turns is None
        return torch.cat([self._project_factors(number, part) for number, part in enumerate(gradients)], dim=1)

    def project_range(self, values: Tensor, start: int) -> Tensor:
        """Refuse: coordinates of one block belong together."""
        raise TypeError("a factored projection takes one matrix per block")

    def _project_matrices(self, number: int, matrices: Tensor) -> Tensor:
        table = self._tables[number]
        if isinstance(table, SparseProjection):
            return table.project([matrices])
        moved = matrices
        if table.inputs is not None:
            moved = moved @ table.inputs.to(moved)
        if table.outputs is not None:
            moved = table.outputs.T.to(moved) @ moved
        return moved.flatten(1)

    def _project_factors(self, number: int, gradient: LayerGradient) -> Tensor:
        table = self._tables[number]
        if isinstance(table, SparseProjection) or table.outputs is None or not gradient.has_factors:
            return torch.cat([self._project_matrices(number, rows) for _, rows in gradient.materialised()])
        inputs = gradient.inputs if table.inputs is None else gradient.inputs @ table.inputs.to(gradient.inputs)
        outputs = gradient.outputs @ table.outputs.to(gradient.outputs)
        return (outputs.mT @ inputs).flatten(1)

    def _sides_of(self, number: int) -> _Sides:
        block = self._blocks[number]
        if block.numel <= self._share:
            return _Sides(None, None, block.numel)
        if block.groups > 1:
            return _Sides(None, None, self._share)
        d_in, d_out = self._dims(block)
        return _Sides(None, None, d_in * d_out)

    def _dims(self, block: Block) -> tuple[int, int]:
        side = isqrt(self._share)
        d_in = min(block.d_in, side)
        d_out = min(block.d_out, max(1, self._share // d_in))
        return min(block.d_in, max(1, self._share // d_out)), d_out

    def _matrices(self, number: int, seed: int) -> "_Sides | SparseProjection":
        block = self._blocks[number]
        own = seed + ((2 * number + 1) << 40)
        if block.numel <= self._share:
            return _Sides(None, None, block.numel)
        if block.groups > 1:
            return SparseProjection(self._share, own)
        d_in, d_out = self._dims(block)
        inputs = None if d_in == block.d_in else _signs(own, block.d_in, d_in)
        outputs = None if d_out == block.d_out else _signs(own + (1 << 40), block.d_out, d_out)
        return _Sides(inputs, outputs, d_in * d_out)


def _signs(seed: int, rows: int, columns: int) -> Tensor:
    bits = hashed(seed, np.arange(rows * columns)) & np.uint64(1)
    return torch.from_numpy((bits * 2.0 - 1.0).reshape(rows, columns) / columns**0.5)
