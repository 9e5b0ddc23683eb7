"""Pseudo-gradients of many examples kept in memory, and products with their second moment: the Gauss-Newton matrix itself.

`H̄ v = (1/n) Σ_r g_r ⟨g_r, v⟩` over rows: an example's draws, or combinations of them with the same second moment, of which those that H̄ hardly
has anything of are left out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.block_rows import NUMBERS_AT_ONCE, Drawn, RankOneRows, WholeRows
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.selection import Chosen, Frame, Selection, every_draw
from attribution_core.curvature.vectors import flattened, unflattened
from attribution_core.errors import InvalidInputError
from attribution_core.gradients import Block, Rotation
from attribution_core.progress import NoProgress, Progress, watched

Kept = RankOneRows | WholeRows
# Rows multiplied at once: with few, products would wait for the memory that their results are added up in; joining many takes memory itself.
_ROWS_AT_ONCE = 512
_BYTES_AT_ONCE = 64 << 20
# Whole gradients formed at once.
_WHOLE_AT_ONCE = 64
# Parameters up to which H̄ is formed, if there are as many rows.
_MOST_PARAMETERS = 2048


class PseudoRows:
    """Pseudo-gradients of n examples.

    Args:
        batches: draws of one batch of examples after the other; no more is kept than they hold.
        examples: the examples' row numbers, ascending; counted from 0 by default.
        drawn: the places among these of the examples in the batches, ascending; all by default. The others have no rows.
        frame: which rows are kept, in what basis; by default every draw as it is.
        selection: which rows were chosen before; the batches are then of the examples that it uses.
        progress: asked between batches, and between blocks of rows in all that takes long, whether the work should stop.
    """

    def __init__(
        self,
        batches: Iterable[Draws],
        examples: np.ndarray | None = None,
        drawn: np.ndarray | None = None,
        frame: Frame | None = None,
        selection: Selection | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress or NoProgress()
        self.blocks: list[Block] = []
        self._leaves_out = frame is not None and frame.negligible > 0
        chosen: list[Chosen] = []
        self._parts = list(_gathered(self._kept(batches, frame, selection, chosen)))
        self.selection = Selection.joined(chosen, examples, drawn) if selection is None else selection
        # What each row's products are multiplied with, part by part.
        self._shares: list[Tensor | float] = [1 / self.num_examples] * len(self._parts)

    def _kept(
        self, batches: Iterable[Draws], frame: Frame | None, selection: Selection | None, chosen: list[Chosen]
    ) -> Iterator[list[Kept]]:
        """Yield a batch's rows per block, and note which they are."""
        for draws in watched(batches, self._progress):
            drawn = [Drawn.of([draw[number] for draw in draws]) for number in range(len(draws[0]))]
            self.blocks = [part.block for part in drawn]
            if selection is not None:
                rows = selection.of_batch(sum(batch.size for batch in chosen), drawn)
            else:
                rows = every_draw(drawn) if frame is None else frame.chosen(drawn)
            chosen.append(rows)
            turns = [Rotation(None, None)] * len(drawn) if frame is None else frame.rotations
            yield [part.rows(rows.owners, rows.bases, turn) for part, turn in zip(drawn, turns, strict=True)]

    def __len__(self) -> int:
        return len(self.selection)

    @property
    def num_examples(self) -> int:
        """n, whether all have a row or not."""
        return len(self.selection.examples)

    @property
    def dtype(self) -> torch.dtype:
        """What rows are kept in."""
        return self._like.dtype

    @property
    def nbytes(self) -> int:
        """Bytes kept, once there were products."""
        matrix = self._num_parameters**2 * self.dtype.itemsize if self.has_matrix else 0
        return _bytes(self._parts) + matrix

    @property
    def _num_parameters(self) -> int:
        return sum(block.numel for block in self.blocks)

    @property
    def has_matrix(self) -> bool:
        """Whether products are with H̄ itself, as there are fewer parameters than rows."""
        return self._num_parameters <= min(len(self), _MOST_PARAMETERS)

    @cached_property
    def _matrix(self) -> Tensor:
        """H̄ itself, which is smaller than its rows where there are fewer parameters."""
        size = self._num_parameters
        total = self._like.new_zeros(size, size)
        for own, shares in zip(self._parts, self._weights(), strict=True):
            for part, whole in self._whole(own):
                rows = torch.cat([gradients.flatten(1) for gradients in whole], dim=1)
                total.addmm_((rows * shares[part]).T, rows)
        return total

    def product(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return `H̄ v` per block, for `v` (vectors, groups, d_out, d_in) per block."""
        if self.has_matrix:
            return unflattened(flattened(parts) @ self._matrix, self.blocks)
        total = [torch.zeros_like(part) for part in parts]
        for own, share in zip(self._parts, self._shares, strict=True):
            weights = _inner(own, parts)
            for number, kept in enumerate(own):
                total[number] += kept.combined(weights * share)
        return total

    def inner(self, parts: Sequence[Tensor]) -> Tensor:
        """Return `⟨g, v⟩` of every row with every vector, (rows, vectors)."""
        return torch.cat([_inner(own, parts) for own in self._parts])

    def combined(self, weights: Tensor) -> list[Tensor]:
        """Return `Σ w g` per block, for weights (rows, vectors)."""
        total = [weights.new_zeros(weights.shape[1], *block.shape) for block in self.blocks]
        for own, part in zip(self._parts, weights.split([len(own[0]) for own in self._parts]), strict=True):
            for number, kept in enumerate(own):
                total[number] += kept.combined(part)
        return total

    def gram(self, divisors: Sequence[Tensor]) -> Tensor:
        """Return `⟨g, D⁻¹ g'⟩` of every two rows, (rows, rows), where D is diagonal: (groups, d_out, d_in) per block.

        Only what is up to the diagonal is filled in.
        """
        products, start = self._like.new_zeros(len(self), len(self)), 0
        divisors = [divisor.to(products) for divisor in divisors]
        for number, own in enumerate(self._parts):
            for _, whole in self._whole(own):
                rows, column = slice(start, start + len(whole[0])), 0
                divided = [part / divisor for part, divisor in zip(whole, divisors, strict=True)]
                for other in watched(self._parts[: number + 1], self._progress):
                    products[rows, column : column + len(other[0])] = _inner(other, divided).T
                    column += len(other[0])
                start = rows.stop
        return products

    def _whole(self, own: Sequence[Kept]) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield whole gradients per block, a few rows at a time, and which rows these are."""
        step = max(1, min(_WHOLE_AT_ONCE, NUMBERS_AT_ONCE // sum(block.numel for block in self.blocks)))
        for first in range(0, len(own[0]), step):
            part = slice(first, first + step)
            yield part, [kept.whole(part) for kept in own]

    def _weights(self) -> list[Tensor]:
        """Return what each row's products are multiplied with, (rows, 1) part by part."""
        pairs = zip(self._parts, self._shares, strict=True)
        return [self._like.new_full((len(own[0]), 1), s) if isinstance(s, float) else s for own, s in pairs]

    @cached_property
    def diagonals(self) -> list[Tensor]:
        """`diag(H̄)` of the rows kept, (groups, d_out, d_in) per block."""
        total = [torch.zeros(block.shape, dtype=self._like.dtype, device=self._like.device) for block in self.blocks]
        for own, weights in zip(watched(self._parts, self._progress), self._weights(), strict=True):
            for number, kept in enumerate(own):
                total[number] += kept.diagonal(weights)
        return total

    def left_out(self, diagonals: Sequence[Tensor]) -> list[Tensor]:
        """Return the diagonal of what is left out, (groups, d_out, d_in) per block, given that of all there is."""
        if not self._leaves_out:
            return [torch.zeros_like(whole) for whole in diagonals]
        return [(whole - own).clamp(min=0) for whole, own in zip(diagonals, self.diagonals, strict=True)]

    def without(self, rows: np.ndarray, num_examples: int) -> "PseudoRows":
        """Return rows whose products are with the matrix that a group leaves behind, `(1/n) Σ_{i ∉ F}`; nothing is copied.

        Where only some examples are kept, those outside the group stand for all n - |F|, so that the matrix is never negative.

        Raises:
            InvalidInputError: if none is left.
        """
        staying = ~np.isin(self.selection.examples, rows)
        if not staying.any():
            raise InvalidInputError(
                "the group holds every example whose curvature is known: use the additive estimator", "/estimator"
            )
        share = (1 - len(rows) / num_examples) / staying.sum()
        less = copy(self)
        for name in ("diagonals", "_matrix"):
            vars(less).pop(name, None)
        shares = torch.from_numpy(staying[self.selection.owners]).to(self._like).unsqueeze(1) * share
        less._shares = list(shares.split([len(own[0]) for own in self._parts]))
        return less

    @property
    def _like(self) -> Tensor:
        first = self._parts[0][0]
        return first.inputs if isinstance(first, RankOneRows) else first.values

    def mean_eigenvalues(self) -> list[float]:
        """Return each block's `trace(H̄)/size`."""
        traces = [
            sum(float(own[number].squares().sum(dtype=torch.float64)) for own in self._parts)
            for number in range(len(self.blocks))
        ]
        return [trace / self.num_examples / block.numel for trace, block in zip(traces, self.blocks, strict=True)]

    def layerwise(self, parts: Sequence[Tensor], damping: Sequence[float]) -> list[Tensor]:
        """Return `mean_i (λ + g_i g_iᵀ)⁻¹ v` per block: the mean of inverses in place of the inverse of the mean.

        By Sherman and Morrison each term is `(v - g ⟨g, v⟩ / (λ + ‖g‖²)) / λ`. Source: Kwon et al. 2024, equation 5.
        """
        total = [part / rate for part, rate in zip(parts, damping, strict=True)]
        for own in self._parts:
            for number, kept in enumerate(own):
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


def _inner(own: Sequence[Kept], parts: Sequence[Tensor]) -> Tensor:
    products = [kept.inner(part) for kept, part in zip(own, parts, strict=True)]
    return torch.stack(products).sum(0)


def _bytes(parts: Sequence[Sequence[Kept]]) -> int:
    return sum(tensor.nbytes for own in parts for kept in own for tensor in vars(kept).values())


def _gathered(batches: Iterable[list[Kept]]) -> Iterator[list[Kept]]:
    """Yield the rows of as many batches together as are multiplied at once."""
    waiting: list[list[Kept]] = []
    for kept in batches:
        waiting.append(kept)
        if sum(len(own[0]) for own in waiting) >= _ROWS_AT_ONCE or _bytes(waiting) >= _BYTES_AT_ONCE:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: Sequence[Sequence[Kept]]) -> list[Kept]:
    return [type(same[0]).joined(same) for same in zip(*parts, strict=True)]
