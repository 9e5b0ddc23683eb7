"""Pseudo-gradients of a batch, from which curvatures are summed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor

from attribution_core.gradients import LayerGradient


@dataclass(frozen=True)
class Draws(Sequence[Sequence[LayerGradient]]):
    """Pseudo-gradients `g` of one batch, whose `Σ g gᵀ` is its Fisher matrix.

    Attributes:
        parts: per drawn or enumerated label, those of all examples; or sets of those that matter. One entry per block.
        inputs: in the second case the input factors of all examples, where no objective changes them (`Pass.inputs`).
        shortfall: `1 - p` of each example's target (batch,), where the task has it.
    """

    parts: Sequence[Sequence[LayerGradient]] = ()
    inputs: Sequence[LayerGradient | None] | None = None
    shortfall: Tensor | None = None

    @overload
    def __getitem__(self, place: int) -> Sequence[LayerGradient]: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Sequence[LayerGradient]]: ...
    def __getitem__(self, place: int | slice) -> Sequence[LayerGradient] | Sequence[Sequence[LayerGradient]]:
        return self.parts[place]

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def aligned(self) -> bool:
        """Whether every part has all examples."""
        return self.inputs is None

    def compact(self) -> "Draws":
        """Return the same with whole gradients where these are smaller than their factors, and without the inputs."""
        return Draws([compact(part) for part in self.parts], None if self.aligned else (), self.shortfall)


def compact(gradients: Sequence[LayerGradient]) -> list[LayerGradient]:
    """Return each block's gradients whole where that takes fewer numbers than their factors."""
    return [gradient.compact() for gradient in gradients]
