"""What an inverse curvature does to gradients."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from attribution_core.errors import InvalidInputError
from attribution_core.gradients import AnyRotation, LayerGradient

if TYPE_CHECKING:
    from attribution_core.curvature.group import Group
    from attribution_core.curvature.whitening import Whitening


class Curvature(ABC):
    """The curvature `H̄` of the mean loss; vectors are one tensor (…, groups, d_out, d_in) per block.

    Attributes:
        solves_cheaply: a solve takes no pass over training examples, so that every training example can have its own.
    """

    solves_cheaply: ClassVar[bool] = True

    @abstractmethod
    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v`; how λ follows from the damping is the curvature's own.

        Raises:
            SingularCurvatureError: if `H̄ + λ` cannot be inverted.
        """

    def solve_factored(self, gradients: Sequence[LayerGradient], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v` of gradients given as factors."""
        return self.solve([gradient.materialise() for gradient in gradients], damping)

    @property
    def rotations(self) -> Sequence[AnyRotation] | None:
        """Of each block, into the basis that the curvature is diagonal in; None for none."""
        return None

    def solve_turned(self, gradients: Sequence[LayerGradient], damping: float) -> list[Tensor]:
        """Return what `solve_factored` does as `turned` has it by the curvature's rotations: inputs stay along their axes."""
        return self.solve_factored(gradients, damping)

    def without(self, group: "Group") -> "Curvature":
        """Return `H̄ - H_F/n`, the curvature that a group leaves behind: divided by n still, with the λ of the whole.

        Raises:
            InvalidInputError: if this curvature cannot tell what a group's part of it is.
        """
        raise InvalidInputError("this curvature has no part for a group: use the additive estimator", "/estimator")

    def products_without(self, count: int) -> int:
        """Return how many products of one example with one vector `without` takes of so many examples; 0 where it differentiates each once."""
        return 0

    def penalised(self, penalty: float) -> "Curvature":
        """Return `H̄ + penalty`, with the λ of `H̄`.

        Raises:
            InvalidInputError: if this curvature takes none.
        """
        raise InvalidInputError("this curvature takes no penalty on the parameters")

    def whitening(self, damping: float) -> "list[Whitening] | None":
        """Return the basis of each block in which rows are sketched, made at one damping; None for the parameters' own."""
        return None

    def paired(self, first: Sequence[LayerGradient], second: Sequence[LayerGradient], damping: float) -> Tensor:
        """Return `uᵢᵀ (H̄ + λ)⁻¹ vᵢ` of each example's two gradients, (batch,)."""
        return paired(self.solve_factored(first, damping), second)

    def quadratic(self, gradients: Sequence[LayerGradient], damping: float) -> Tensor:
        """Return `uᵢᵀ (H̄ + λ)⁻¹ uᵢ` of each example's gradient, (batch,)."""
        return self.paired(gradients, gradients, damping)


class Identity(Curvature):
    """No curvature at all: `H̄ + λ` is the identity whatever the damping."""

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return the gradients as they are."""
        return list(gradients)

    def quadratic(self, gradients: Sequence[LayerGradient], damping: float) -> Tensor:
        """Return the squared length of each example's gradient, (batch,)."""
        return torch.stack([_squares(gradient) for gradient in gradients]).sum(0)


class Multiple(Identity):
    """A curvature whose inverse is a number, whatever the damping."""

    def __init__(self, inverse: float) -> None:
        self.inverse = inverse

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return the gradients times the number."""
        return [gradient * self.inverse for gradient in gradients]

    def quadratic(self, gradients: Sequence[LayerGradient], damping: float) -> Tensor:
        """Return the squared length of each example's gradient times the number, (batch,)."""
        return self.inverse * super().quadratic(gradients, damping)


def unit_of_damping(mean_eigenvalue: float) -> float:
    """Return what λ is a multiple of: the mean eigenvalue.

    It is 1 where all are 0: no training example has a gradient there (dead units, say), so any λ makes its share of scores 0.
    """
    return mean_eigenvalue or 1.0


def paired(first: Sequence[Tensor], second: Sequence[LayerGradient]) -> Tensor:
    """Return the inner product of each matrix of `first` with the same example of `second`, (batch,)."""
    products = []
    for matrices, gradient in zip(first, second, strict=True):
        parts = [(matrices[part] * rows).flatten(1).sum(1) for part, rows in gradient.materialised()]
        products.append(torch.cat(parts))
    return torch.stack(products).sum(0)


def _squares(gradient: LayerGradient) -> Tensor:
    if gradient.rank_one:
        return (gradient.inputs.square().sum(-1) * gradient.outputs.square().sum(-1)).flatten(1).sum(1)
    return torch.cat([rows.flatten(1).square().sum(1) for _, rows in gradient.materialised()])
