"""Pseudo-gradients of many examples kept in memory, and products with their second moment: the Gauss-Newton matrix itself.

`H̄ v = (1/n) Σ_i Σ_c g_ic ⟨g_ic, v⟩`. A layer without positions is kept as `a` and the draws' `g`, any other as whole gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.ekfac import Draws
from attribution_core.errors import InvalidInputError
from attribution_core.gradients import Block, LayerGradient, Rotation


@dataclass(frozen=True)
class _RankOne:
    """Gradients `g_c aᵀ`: inputs (groups, n, d_in), outputs (groups, n, draws, d_out).

    Examples come before vectors in every intermediate result, so that no product has to move what another one wrote.
    """

    inputs: Tensor
    outputs: Tensor

    def inner(self, matrices: Tensor) -> Tensor:
        groups, n, _, d_out = self.outputs.shape
        moved = self.inputs @ matrices.transpose(0, 1).flatten(1, 2).mT  # (groups, n, vectors · d_out)
        return (self.outputs @ moved.view(groups, n, len(matrices), d_out).mT).sum(0)

    def combined(self, weights: Tensor) -> Tensor:
        outputs = (weights.mT @ self.outputs).flatten(2)  # (groups, n, vectors · d_out)
        total = outputs.mT @ self.inputs
        return total.view(len(total), weights.shape[2], -1, self.inputs.shape[2]).transpose(0, 1)

    def squares(self) -> Tensor:
        return (self.outputs.square().sum(-1) * self.inputs.square().sum(-1, keepdim=True)).sum(0)

    @staticmethod
    def joined(parts: Sequence["_RankOne"]) -> "_RankOne":
        return _RankOne(torch.cat([part.inputs for part in parts], 1), torch.cat([part.outputs for part in parts], 1))


@dataclass(frozen=True)
class _Whole:
    """Gradients (n, draws, groups, d_out, d_in)."""

    values: Tensor

    def inner(self, matrices: Tensor) -> Tensor:
        products = self.values.flatten(2).flatten(0, 1) @ matrices.flatten(1).T
        return products.view(*self.values.shape[:2], len(matrices))

    def combined(self, weights: Tensor) -> Tensor:
        total = weights.flatten(0, 1).T @ self.values.flatten(2).flatten(0, 1)
        return total.view(len(total), *self.values.shape[2:])

    def squares(self) -> Tensor:
        return self.values.flatten(2).square().sum(-1)

    @staticmethod
    def joined(parts: Sequence["_Whole"]) -> "_Whole":
        return _Whole(torch.cat([part.values for part in parts]))


Kept = _RankOne | _Whole
# Examples multiplied at once: with few, products would wait for the memory that their results are added up in.
_EXAMPLES_AT_ONCE = 256


class PseudoRows:
    """Pseudo-gradients of n examples.

    Args:
        batches: draws of one batch after the other; no more is kept than they hold.
        examples: the examples' row numbers, in their order; counted from 0 by default.
        rotations: of each block, the basis in which vectors are; the parameters' own by default.
    """

    def __init__(
        self,
        batches: Iterable[Draws],
        examples: np.ndarray | None = None,
        rotations: Sequence[Rotation] | None = None,
    ) -> None:
        self._batches: list[list[Kept]] = []
        self.blocks: list[Block] = []
        self.num_examples = 0
        waiting: list[list[Kept]] = []
        for draws in batches:
            self.blocks = [part.block for part in draws[0]]
            self.num_examples += len(draws[0][0])
            turns = [Rotation(None, None)] * len(self.blocks) if rotations is None else rotations
            waiting.append([_kept([draw[number] for draw in draws], turn) for number, turn in enumerate(turns)])
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
            products = [kept.inner(part) for kept, part in zip(batch, parts, strict=True)]
            weights = torch.stack(products).sum(0)  # (n, draws, vectors)
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
        shares = torch.from_numpy(staying).to(like) * share
        less._shares = [part.view(-1, 1, 1) for part in shares.split(sizes)]
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
                weights = kept.inner(parts[number]) / (rate + kept.squares()).unsqueeze(-1)
                total[number] -= kept.combined(weights) / (rate * self.num_examples)
        return total


class KeptRows:
    """Pseudo-gradients of several checkpoints, kept while they fit a bound together; those that do not are made for every use.

    Args:
        limit: bytes; the first ones are kept in any case.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[int, PseudoRows] = {}

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(rows.nbytes for rows in self._kept.values())

    def get(self, checkpoint: int, make: Callable[[], PseudoRows]) -> PseudoRows:
        """Return a checkpoint's pseudo-gradients."""
        if checkpoint in self._kept:
            return self._kept[checkpoint]
        rows = make()
        if not self._kept or self.nbytes + rows.nbytes <= self._limit:
            self._kept[checkpoint] = rows
        return rows


def _counted(batches: Sequence[Sequence[Kept]]) -> int:
    """Return how many examples some batches have."""
    firsts = (batch[0] for batch in batches)
    return sum(kept.inputs.shape[1] if isinstance(kept, _RankOne) else len(kept.values) for kept in firsts)


def _joined(batches: Sequence[Sequence[Kept]]) -> list[Kept]:
    return [type(parts[0]).joined(parts) for parts in zip(*batches, strict=True)]


def _kept(parts: Sequence[LayerGradient], turn: Rotation) -> Kept:
    block = parts[0].block
    smaller = block.d_in + len(parts) * block.d_out < len(parts) * block.d_in * block.d_out
    if parts[0].rank_one and block.inputs_fixed and smaller:
        outputs = torch.stack([turn.output_factor(part)[:, :, 0] for part in parts], 1)  # (n, draws, groups, d_out)
        return _RankOne(turn.input_factor(parts[0])[:, :, 0].transpose(0, 1), outputs.permute(2, 0, 1, 3).contiguous())
    return _Whole(torch.stack([turn.of(part) for part in parts], 1))
