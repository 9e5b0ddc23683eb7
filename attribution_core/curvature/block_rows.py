"""Rows (pseudo-gradients) of one block: as `a` and `g` where the layer has no positions, else as whole gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution_core.gradients import AnyRotation, Block, LayerGradient, Rotation

# Numbers of whole gradients formed at once.
NUMBERS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class RankOneRows:
    """Gradients `g aᵀ`, where the rows of an example have `a` in common: inputs (groups, examples, d_in), outputs (groups, rows, d_out).

    Rows come before vectors in every intermediate result, so that no product has to move what another one wrote.

    Attributes:
        owners: whose example's each row is, (rows,).
    """

    inputs: Tensor
    outputs: Tensor
    owners: Tensor

    def __len__(self) -> int:
        return self.outputs.shape[1]

    @property
    def _has_one_each(self) -> bool:
        """Whether every example has exactly one row, so that rows and examples are the same."""
        return self.inputs.shape[1] == self.outputs.shape[1]

    def inner(self, matrices: Tensor) -> Tensor:
        """Return inner products with `matrices` (vectors, groups, d_out, d_in) as (rows, vectors)."""
        groups, rows, d_out = self.outputs.shape
        moved = self.inputs @ matrices.transpose(0, 1).flatten(1, 2).mT  # (groups, examples, vectors · d_out)
        own = moved if self._has_one_each else moved.index_select(1, self.owners)
        own = own.view(groups, rows, len(matrices), d_out)
        return (own @ self.outputs.unsqueeze(-1)).squeeze(-1).sum(0)

    def combined(self, weights: Tensor) -> Tensor:
        """Return sums of the rows weighted by (rows, vectors), as (vectors, groups, d_out, d_in)."""
        outputs = (weights.unsqueeze(-1) * self.outputs.unsqueeze(2)).flatten(2)  # (groups, rows, vectors · d_out)
        if not self._has_one_each:
            summed = outputs.new_zeros(*self.inputs.shape[:2], outputs.shape[2])
            outputs = summed.index_add_(1, self.owners, outputs)
        total = outputs.mT @ self.inputs
        return total.view(len(total), weights.shape[1], -1, self.inputs.shape[2]).transpose(0, 1)

    def squares(self) -> Tensor:
        """Return each row's squared length, (rows,)."""
        return (self.outputs.square().sum(-1) * self.inputs.square().sum(-1)[:, self.owners]).sum(0)

    def diagonal(self, weights: Tensor) -> Tensor:
        """Return the sum of squared rows weighted by (rows, 1), as (groups, d_out, d_in)."""
        return (self.outputs.square() * weights).mT @ self.inputs.square()[:, self.owners]

    def whole(self, part: slice) -> Tensor:
        """Return some rows whole, (count, groups, d_out, d_in)."""
        return (self.outputs[:, part].unsqueeze(-1) * self.inputs[:, self.owners[part]].unsqueeze(-2)).transpose(0, 1)

    @staticmethod
    def joined(parts: Sequence["RankOneRows"]) -> "RankOneRows":
        """Return the rows of all parts."""
        starts = np.cumsum([0, *(part.inputs.shape[1] for part in parts)])
        return RankOneRows(
            torch.cat([part.inputs for part in parts], 1),
            torch.cat([part.outputs for part in parts], 1),
            torch.cat([part.owners + int(start) for part, start in zip(parts, starts, strict=False)]),
        )


@dataclass(frozen=True)
class WholeRows:
    """Gradients (rows, groups, d_out, d_in)."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def inner(self, matrices: Tensor) -> Tensor:
        """Return inner products with `matrices` (vectors, groups, d_out, d_in) as (rows, vectors)."""
        return self.values.flatten(1) @ matrices.flatten(1).T

    def combined(self, weights: Tensor) -> Tensor:
        """Return sums of the rows weighted by (rows, vectors), as (vectors, groups, d_out, d_in)."""
        return (weights.T @ self.values.flatten(1)).view(weights.shape[1], *self.values.shape[1:])

    def squares(self) -> Tensor:
        """Return each row's squared length, (rows,)."""
        return self.values.flatten(1).square().sum(1)

    def diagonal(self, weights: Tensor) -> Tensor:
        """Return the sum of squared rows weighted by (rows, 1), as (groups, d_out, d_in)."""
        return (weights.T @ self.values.flatten(1).square()).view(self.values.shape[1:])

    def whole(self, part: slice) -> Tensor:
        """Return some rows whole, (count, groups, d_out, d_in)."""
        return self.values[part]

    @staticmethod
    def joined(parts: Sequence["WholeRows"]) -> "WholeRows":
        """Return the rows of all parts."""
        return WholeRows(torch.cat([part.values for part in parts]))


@dataclass(frozen=True)
class Drawn:
    """The draws of one batch in one block.

    Attributes:
        outputs: (n, draws, groups, d_out); where `inputs` is None whole gradients, (n, draws, groups, d_out, d_in).
        inputs: what all draws of an example have in common, (n, groups, d_in); None where a gradient is no product, or takes less than one.
    """

    block: Block
    outputs: Tensor
    inputs: Tensor | None

    @classmethod
    def of(cls, parts: Sequence[LayerGradient]) -> "Drawn":
        """Return one block's draws in the smaller form."""
        block = parts[0].block
        smaller = block.d_in + len(parts) * block.d_out < len(parts) * block.d_in * block.d_out
        if parts[0].rank_one and block.inputs_fixed and smaller:
            return cls(block, torch.stack([part.outputs[:, :, 0] for part in parts], 1), parts[0].inputs[:, :, 0])
        return cls(block, torch.stack([part.materialise() for part in parts], 1), None)

    def grams(self) -> Tensor:
        """Return the inner products of each example's draws, (n, draws, draws)."""
        if self.inputs is None:
            rows = self.outputs.flatten(2)
            return rows @ rows.mT
        outputs = self.outputs.transpose(1, 2)  # (n, groups, draws, d_out)
        lengths = self.inputs.square().sum(-1)
        return ((outputs @ outputs.mT) * lengths[:, :, None, None]).sum(1)

    def rows(self, owners: Tensor, bases: Tensor, turn: AnyRotation) -> RankOneRows | WholeRows:
        """Return combinations of the draws of examples, in a rotated basis.

        Args:
            owners: whose each row is, (rows,).
            bases: what its example's draws are multiplied with, (rows, draws).
            turn: to the basis.
        """
        mixed = self.outputs.new_empty(len(owners), *self.outputs.shape[2:])
        step = max(1, NUMBERS_AT_ONCE // self.outputs[0].numel())
        for part in (slice(first, first + step) for first in range(0, len(owners), step)):
            mixed[part] = (bases[part].unsqueeze(1) @ self.outputs[owners[part]].flatten(2)).view_as(mixed[part])
        if self.inputs is None:
            return WholeRows(turn.forward(mixed))
        if not isinstance(turn, Rotation):
            return WholeRows(turn.forward(mixed.unsqueeze(-1) * self.inputs[owners].unsqueeze(-2)))
        used, places = owners.unique(return_inverse=True)
        factors = LayerGradient(self.block, self.inputs[used].unsqueeze(2), mixed.unsqueeze(2))
        turned = (turn.input_factor(factors)[:, :, 0], turn.output_factor(factors)[:, :, 0])
        inputs, outputs = (part.transpose(0, 1).contiguous() for part in turned)
        return RankOneRows(inputs, outputs, places)
