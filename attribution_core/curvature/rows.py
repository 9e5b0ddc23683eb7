"""Pseudo-gradients of many examples kept in memory, and products with their second moment: the Gauss-Newton matrix itself.

`H̄ v = (1/n) Σ_i Σ_c g_ic ⟨g_ic, v⟩`. A layer without positions is kept as `a` and the draws' `g`, any other as whole gradients.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.ekfac import Draws
from attribution_core.errors import InvalidInputError
from attribution_core.gradients import Block, LayerGradient


@dataclass(frozen=True)
class _RankOne:
    """Gradients `g_c aᵀ`: inputs (n, groups, d_in), outputs (draws, n, groups, d_out)."""

    inputs: Tensor
    outputs: Tensor

    def inner(self, matrices: Tensor) -> Tensor:
        moved = torch.einsum("ngi,qgoi->qngo", self.inputs, matrices)
        return torch.einsum("qngo,cngo->qcn", moved, self.outputs)

    def combined(self, weights: Tensor) -> Tensor:
        outputs = torch.einsum("qcn,cngo->qngo", weights, self.outputs)
        return torch.einsum("qngo,ngi->qgoi", outputs, self.inputs)

    def squares(self) -> Tensor:
        return self.outputs.square().sum(-1).mul(self.inputs.square().sum(-1)).sum(-1)

    @staticmethod
    def joined(parts: Sequence["_RankOne"]) -> "_RankOne":
        return _RankOne(torch.cat([part.inputs for part in parts]), torch.cat([part.outputs for part in parts], 1))


@dataclass(frozen=True)
class _Whole:
    """Gradients (draws, n, groups, d_out, d_in)."""

    values: Tensor

    def inner(self, matrices: Tensor) -> Tensor:
        products = matrices.flatten(1) @ self.values.flatten(2).flatten(0, 1).T
        return products.view(len(matrices), *self.values.shape[:2])

    def combined(self, weights: Tensor) -> Tensor:
        total = weights.flatten(1) @ self.values.flatten(2).flatten(0, 1)
        return total.view(len(weights), *self.values.shape[2:])

    def squares(self) -> Tensor:
        return self.values.flatten(2).square().sum(-1)

    @staticmethod
    def joined(parts: Sequence["_Whole"]) -> "_Whole":
        return _Whole(torch.cat([part.values for part in parts], 1))


Kept = _RankOne | _Whole
# Examples multiplied at once: with few, products would wait for the memory that their results are added up in.
_EXAMPLES_AT_ONCE = 256


class PseudoRows:
    """Pseudo-gradients of n examples.

    Args:
        batches: draws of one batch after the other; no more is kept than they hold.
        examples: the examples' row numbers, in their order; counted from 0 by default.
    """

    def __init__(self, batches: Iterable[Draws], examples: np.ndarray | None = None) -> None:
        self._batches: list[list[Kept]] = []
        self.blocks: list[Block] = []
        self.num_examples = 0
        waiting: list[list[Kept]] = []
        for draws in batches:
            self.blocks = [part.block for part in draws[0]]
            self.num_examples += len(draws[0][0])
            waiting.append([_kept([draw[number] for draw in draws]) for number in range(len(self.blocks))])
            if _counted(waiting) >= _EXAMPLES_AT_ONCE:
                self._batches.append(_joined(waiting))
                waiting = []
        if waiting:
            self._batches.append(_joined(waiting))
        self._examples = np.arange(self.num_examples) if examples is None else examples
        # What each example's products are multiplied with, batch by batch.
        self._shares: list[Tensor | float] = [1 / self.num_examples] * len(self._batches)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(tensor.nbytes for batch in self._batches for kept in batch for tensor in vars(kept).values())

    def product(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return `H̄ v` per block, for `v` (vectors, groups, d_out, d_in) per block."""
        total = [torch.zeros_like(part) for part in parts]
        for batch, share in zip(self._batches, self._shares, strict=True):
            weights = torch.stack([kept.inner(part) for kept, part in zip(batch, parts, strict=True)]).sum(0)
            for number, kept in enumerate(batch):
                total[number] += kept.combined(weights * share)
        return total

    def without(self, rows: np.ndarray, num_examples: int) -> "PseudoRows":
        """Return rows whose products are with the matrix that a group leaves behind, `(1/n) Σ_{i ∉ F}`; nothing is copied.

        Where only some examples are kept, those outside the group stand for all n - |F|, so that the matrix is never negative.

        Raises:
            InvalidInputError: if none is left.
        """
        staying = ~np.isin(self._examples, rows)
        if not staying.any():
            raise InvalidInputError(
                "the group holds every example whose curvature is known: use the additive estimator", "/estimator"
            )
        share = (1 - len(rows) / num_examples) / staying.sum()
        sizes = [_counted([batch]) for batch in self._batches]
        less = copy(self)
        like = next(iter(vars(self._batches[0][0]).values()))
        less._shares = [part * share for part in torch.from_numpy(staying).to(like).split(sizes)]
        return less

    def mean_eigenvalues(self) -> list[float]:
        """Return each block's `trace(H̄)/size`."""
        traces = [
            sum(float(batch[number].squares().sum(dtype=torch.float64)) for batch in self._batches)
            for number in range(len(self.blocks))
        ]
        return [trace / self.num_examples / block.numel for trace, block in zip(traces, self.blocks, strict=True)]

    def layerwise(self, parts: Sequence[Tensor], damping: Sequence[float]) -> list[Tensor]:
        """Return `mean_i (λ + g_i g_iᵀ)⁻¹ v` per block: the mean of inverses in place of the inverse of the mean.

        By Sherman and Morrison each term is `(v - g ⟨g, v⟩ / (λ + ‖g‖²)) / λ`. Source: Kwon et al. 2024, equation 5.
        """
        total = [part / rate for part, rate in zip(parts, damping, strict=True)]
        for batch in self._batches:
            for number, kept in enumerate(batch):
                rate = damping[number]
                weights = kept.inner(parts[number]) / (rate + kept.squares())
                total[number] -= kept.combined(weights) / (rate * self.num_examples)
        return total


def _counted(batches: Sequence[Sequence[Kept]]) -> int:
    """Return how many examples some batches have."""
    firsts = (batch[0] for batch in batches)
    return sum((kept.outputs if isinstance(kept, _RankOne) else kept.values).shape[1] for kept in firsts)


def _joined(batches: Sequence[Sequence[Kept]]) -> list[Kept]:
    return [type(parts[0]).joined(parts) for parts in zip(*batches, strict=True)]


def _kept(parts: Sequence[LayerGradient]) -> Kept:
    block = parts[0].block
    smaller = block.d_in + len(parts) * block.d_out < len(parts) * block.d_in * block.d_out
    if parts[0].rank_one and block.inputs_fixed and smaller:
        return _RankOne(parts[0].inputs[:, :, 0], torch.stack([part.outputs[:, :, 0] for part in parts]))
    return _Whole(torch.stack([part.materialise() for part in parts]))
