"""Second moments of pseudo-gradients, block by block, from whose eigenvectors axes are made.

Of small blocks those of gradients as they are; else those of their sides: `Σ ΦᵀΦ` and `Σ ΦΦᵀ` of each example's gradient `Φ = Σ_t g_t a_tᵀ` (Shampoo), or
`Σ aaᵀ` and `Σ ggᵀ` position by position, as if these were examples of their own and inputs had nothing to do with output gradients (K-FAC).

Sources: Martens & Grosse 2015 (K-FAC); Gupta et al. 2018 (Shampoo), Vyas et al. 2024 (SOAP: eigenvalues corrected in Shampoo's basis).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.draws import Draws
from attribution_core.curvature.fisher import ShortfallSums
from attribution_core.gradients import Block, LayerGradient

# Beyond this size a side keeps its own axes: its eigendecomposition would cost more than all else together.
MAX_ROTATED_DIM = 4096
# Sides of elementwise layers, up to which products of columns are faster than those of matrices.
_FEW = 2

Arrays = dict[str, np.ndarray]


def whole_blocks(blocks: Sequence[Block], parameters: int, examples: int) -> set[int]:
    """Return the numbers of the blocks that are small enough for a matrix of their own.

    Args:
        blocks: all.
        parameters: that such a block has at most.
        examples: n; of more parameters than that the matrix would know next to nothing in most directions.
    """
    return {number for number, block in enumerate(blocks) if block.numel <= min(parameters, examples)}


class CovarianceSums:
    """Sums of second moments per block in float64; shards add up in any grouping.

    Sides that are not rotated are not collected, but for K-FAC their traces are.

    Args:
        whole: the numbers of the blocks that have the moments of whole gradients.
        by_example: whether the others have those of examples' gradients, not of positions.
        for_kfac: also count the positions that are not padding, which K-FAC divides by, and keep each side that is not rotated as the spectrum of
            an isotropic matrix with its trace.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        whole: Collection[int] = (),
        by_example: bool = False,
        for_kfac: bool = False,
    ) -> None:
        self.blocks = list(blocks)
        sides = _ExampleSides if by_example else _Sides
        self._sums = [
            _Whole.empty(block) if number in whole else sides.empty(block, for_kfac=for_kfac)
            for number, block in enumerate(blocks)
        ]
        self._positions = np.zeros(len(self.blocks)) if for_kfac else None

    def add(self, draws: Draws) -> None:
        """Add a batch; the inputs that all draws share are added once."""
        for number, (block, sums) in enumerate(zip(self.blocks, self._sums, strict=True)):
            parts = [draw[number] for draw in draws]
            shared = parts[0] if draws.inputs is None else draws.inputs[number]
            if self._positions is not None:
                assert shared is not None
                self._positions[number] += float(shared.inputs.any(-1).sum()) / block.groups
            sums.add(parts, shared)

    def arrays(self) -> Arrays:
        """Return the sums by name."""
        found = {
            f"{name}.{number}": value for number, sums in enumerate(self._sums) for name, value in sums.arrays().items()
        }
        return found if self._positions is None else found | {"positions": self._positions}


@dataclass(frozen=True)
class _Whole:
    """`Σ vec(g aᵀ) vec(g aᵀ)ᵀ` of one block, (numel, numel)."""

    total: Tensor

    @classmethod
    def empty(cls, block: Block) -> "_Whole":
        return cls(torch.zeros(block.numel, block.numel, dtype=torch.float64))

    def add(self, parts: Sequence[LayerGradient], shared: LayerGradient | None) -> None:
        for part in parts:
            rows = part.materialise().flatten(1)
            _add(self.total, rows.mT @ rows)
            # What has no finite square is seen, as it is in factors, even where the model is so sure of it that its gradient is 0.
            inputs = part.inputs.flatten()
            self.total.add_(0 * (inputs @ inputs).cpu())

    def arrays(self) -> Arrays:
        return {"whole": self.total.numpy()}


@dataclass(frozen=True)
class _Sides:
    """`Σ aaᵀ` and `Σ ggᵀ` of one block, each (groups, d, d), its spectrum (groups, d), or not collected."""

    block: Block
    inputs: Tensor | None
    outputs: Tensor | None

    @classmethod
    def empty(cls, block: Block, *, for_kfac: bool) -> "_Sides":
        # One-hot output factors (embeddings) are uncorrelated as they are.
        rotates_outputs = not block.outputs_fixed and block.d_out <= MAX_ROTATED_DIM
        return cls(
            block,
            _zeros(block.groups, block.d_in, rotated=block.d_in <= MAX_ROTATED_DIM, needed=for_kfac),
            _zeros(block.groups, block.d_out, rotated=rotates_outputs, needed=for_kfac),
        )

    def add(self, parts: Sequence[LayerGradient], shared: LayerGradient | None) -> None:
        if self.inputs is not None:
            for part in [shared] if self.block.inputs_fixed else parts:
                assert part is not None
                _add(self.inputs, _moment(part.inputs, self.inputs))
        if self.outputs is not None and self.block.outputs_fixed:
            # One 1 for each position, whatever is drawn.
            assert shared is not None
            _add(self.outputs, _moment(shared.inputs.any(-1, keepdim=True).double(), self.outputs))
        elif self.outputs is not None:
            for part in parts:
                _add(self.outputs, _moment(part.dense_outputs(), self.outputs))

    def arrays(self) -> Arrays:
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        return {
            name if value.dim() == 3 else f"spectrum.{name}": value.numpy()
            for name, value in sides.items()
            if value is not None
        }


class _ExampleSides(_Sides):
    """`Σ ΦᵀΦ` and `Σ ΦΦᵀ` of one block's gradients Φ, (groups, d_out, d_in) per example."""

    def add(self, parts: Sequence[LayerGradient], shared: LayerGradient | None) -> None:
        if self.block.outputs_fixed:  # of an embedding's rows each is looked up by itself
            super().add(parts, shared)
            return
        for part in parts:
            for inputs, outputs in _side_moments(part):
                if self.inputs is not None:
                    _add(self.inputs, inputs)
                if self.outputs is not None:
                    _add(self.outputs, outputs)


def _add(total: Tensor, part: Tensor) -> None:
    """Add a batch's sum to a total in float64, without a copy in float64 as torch makes one (a third of the time)."""
    sums = total.numpy()
    np.add(sums, part.cpu().numpy(), out=sums)


def _side_moments(gradient: LayerGradient) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts of `Σ ΦᵀΦ` and `Σ ΦΦᵀ` over a batch, from factors where positions are fewer than either side has dimensions."""
    block = gradient.block
    if gradient.has_factors and gradient.positions <= min(block.d_in, block.d_out):
        a, g = gradient.inputs, gradient.outputs
        yield _cross_moment(a, (g @ g.mT) @ a), _cross_moment(g, (a @ a.mT) @ g)
        return
    for _, rows in gradient.materialised():
        yield _second_moment(rows), _second_moment(rows.mT)


def _cross_moment(first: Tensor, second: Tensor) -> Tensor:
    """Sum over examples and positions of outer products: both (batch, groups, positions, d) to (groups, d, d)."""
    joined = [part.transpose(0, 1).flatten(1, 2) for part in (first, second)]
    return joined[0].mT @ joined[1]


def is_summary(name: str) -> bool:
    """Return whether a sum is no matrix: K-FAC's positions, residuals, or the spectrum of a side that is not rotated."""
    return name in ("positions", ShortfallSums.NAME) or name.startswith("spectrum.")


def _zeros(groups: int, dim: int, *, rotated: bool, needed: bool) -> Tensor | None:
    """Return an empty sum of matrices if the side is rotated, else of spectra (groups, dim) if these are needed."""
    if rotated:
        return torch.zeros(groups, dim, dim, dtype=torch.float64)
    return torch.zeros(groups, dim, dtype=torch.float64) if needed else None


def _moment(factor: Tensor, like: Tensor) -> Tensor:
    """Return what a batch adds to a sum of matrices (groups, d, d), or to one of spectra (groups, d): its trace, evenly spread."""
    if like.dim() == 3:
        return _second_moment(factor)
    trace = factor.square().sum((0, 2, 3)).double()  # (groups,)
    return (trace / like.shape[1]).unsqueeze(1).expand_as(like)


def _second_moment(factor: Tensor) -> Tensor:
    """Sum over examples and positions of outer products: (batch, groups, positions, d) to (groups, d, d)."""
    groups, positions, dim = factor.shape[1:]
    if groups > 1 and dim <= _FEW:
        columns = factor.unbind(-1)
        rows = [torch.stack([(one * other).sum((0, 2)) for other in columns], -1) for one in columns]
        moments = torch.stack(rows, -2)
    elif factor.stride(-1) != 1 and dim <= positions:
        moments = (factor.mT @ factor).sum(0)  # joining examples would copy channels that lie apart
    else:
        moments = _cross_moment(factor, factor)
    return moments
