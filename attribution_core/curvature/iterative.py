"""Curvatures that are solved anew for every query, by iterations over training examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from attribution_core.curvature import solvers
from attribution_core.curvature.base import Curvature, unit_of_damping
from attribution_core.curvature.ekfac import EkfacFactors
from attribution_core.curvature.group import Group
from attribution_core.curvature.products import Batches, HessianProducts
from attribution_core.curvature.row_factor import RowFactor
from attribution_core.curvature.rows import PseudoRows
from attribution_core.curvature.vectors import Product, flattened, unflattened
from attribution_core.curvature.whitening import Whitening
from attribution_core.data.batch import Batch
from attribution_core.errors import SingularCurvatureError
from attribution_core.gradients import AnyRotation, Block, LayerGradient

# Numbers in the vectors that are solved at once, and vectors below which products would wait for memory, as long as they are not too large.
_NUMBERS_AT_ONCE = 1 << 22
_VECTORS_AT_ONCE = 64
_MOST_NUMBERS = 1 << 25


class GaussNewton(Curvature):
    """The Gauss-Newton matrix of kept pseudo-gradients, shrunk towards EK-FAC.

    `H̄ = (1 - ρ) mean(g gᵀ) + ρ K`: like a covariance that is shrunk towards a structured target, it needs less damping than the matrix of few
    examples alone. All is done in K's eigenbasis, where K is diagonal; of pseudo-gradients that are left out the diagonal stays. Vectors are solved by
    a factorisation in the space of rows, if there is one at the damping asked for, else by conjugate gradients preconditioned with EK-FAC.

    Args:
        rows: returns the pseudo-gradients in K's eigenbasis; asked once for all the vectors of a call.
        factors: K; also gives each layer's λ, and stands in where a solve per example would be too much (`paired`).
        shrinkage: ρ, from 0 (the Gauss-Newton matrix) to 1 (EK-FAC).
        factor: of the rows at one damping, without a penalty.
        penalty: what is added to both, as a multiple of the identity.

    Source: the mixture is after Ledoit & Wolf 2004, who shrink a covariance; the solve after Wang et al. 2025 (ASTRA).
    """

    def __init__(
        self,
        rows: Callable[[], PseudoRows],
        factors: EkfacFactors,
        iterations: int,
        tolerance: float,
        shrinkage: float = 0.0,
        factor: RowFactor | None = None,
        penalty: float = 0.0,
    ) -> None:
        self.rows = rows
        self._factors = factors
        self._iterations = iterations
        self._tolerance = tolerance
        self._shrinkage = shrinkage
        self._factor = factor
        self._penalty = penalty

    @cached_property
    def _penalised(self) -> EkfacFactors:
        return self._factors.penalised(self._penalty) if self._penalty else self._factors

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v`, λ a multiple of each layer's mean eigenvalue.

        Raises:
            SingularCurvatureError: if the curvature is singular at this damping.
        """
        turned = [turn.forward(part) for part, turn in zip(gradients, self.rotations, strict=True)]
        return self._solved(turned, damping, self.rotations)

    def solve_factored(self, gradients: Sequence[LayerGradient], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v` of gradients given as factors, which are rotated where that is cheaper."""
        return self._solved(self._turned(gradients), damping, self.rotations)

    @property
    def rotations(self) -> Sequence[AnyRotation]:
        """Those of EK-FAC, into whose eigenbasis all is turned."""
        return self._factors.rotations

    def solve_turned(self, gradients: Sequence[LayerGradient], damping: float) -> list[Tensor]:
        """Return what `solve_factored` does, with inputs along K's axes."""
        return self._solved(self._turned(gradients), damping, self._factors.basis.without_inputs)

    def _turned(self, gradients: Sequence[LayerGradient]) -> list[Tensor]:
        return [turn.of(part) for part, turn in zip(gradients, self.rotations, strict=True)]

    def _solved(self, turned: Sequence[Tensor], damping: float, backs: Sequence[AnyRotation]) -> list[Tensor]:
        """Solve in the eigenbasis and turn back."""
        blocks, rows = self._factors.basis.blocks, self.rows()
        diagonal = [part.to(turned[0]) for part in self._diagonal(rows, damping)]
        factor = self._factor
        if factor is not None and factor.damping == damping:
            solve: Product = lambda part: flattened(factor.solve(rows, unflattened(part, blocks), diagonal))  # noqa: E731
        else:
            solve = self._iteration(rows, diagonal, damping)
        solved = _in_parts(turned, _scaled(solve))
        return [turn.back(part) for part, turn in zip(solved, backs, strict=True)]

    def factorised(self, damping: float) -> RowFactor | None:
        """Return the factorisation at a damping, if the rows are few enough for one."""
        rows = self.rows()
        return RowFactor.of(rows, self._diagonal(rows, damping), 1 - self._shrinkage, damping)

    def _diagonal(self, rows: PseudoRows, damping: float) -> list[Tensor]:
        """Return all of `H̄ + λ` that is diagonal: `ρ (K + λ)`, and of the other part the damping and what its rows leave out."""
        factors, share = self._penalised, 1 - self._shrinkage
        rest = rows.left_out(self._factors.eigenvalues)
        return [
            self._shrinkage * factors.damped(number, damping) + share * (rate + self._penalty + rest[number])
            for number, rate in enumerate(factors.rates(damping))
        ]

    def _iteration(self, rows: PseudoRows, diagonal: Sequence[Tensor], damping: float) -> Product:
        """Return what solves flat vectors by conjugate gradients."""
        factors, share = self._penalised, 1 - self._shrinkage
        blocks, whole = factors.basis.blocks, flattened([part.unsqueeze(0) for part in diagonal])
        damped = flattened([factors.damped(number, damping).unsqueeze(0) for number in range(len(blocks))]).to(whole)

        def product(vectors: Tensor) -> Tensor:
            parts = unflattened(vectors, blocks)
            return flattened(rows.product(parts)).mul_(share).addcmul_(vectors, whole)

        return lambda part: solvers.conjugate_gradients(
            product, part, lambda vectors: vectors / damped, self._iterations, self._tolerance
        )

    def without(self, group: Group) -> "GaussNewton":
        """Return the curvature of the other examples, solved by iterations: no factorisation is made for one group."""
        left = self.rows().without(group.rows, group.num_examples)
        return self._with(lambda: left, self._factors.without(group), self._penalty)

    def penalised(self, penalty: float) -> "GaussNewton":
        """Return the curvature plus a multiple of the identity, damped as before and solved by iterations."""
        return self._with(self.rows, self._factors, self._penalty + penalty)

    def _with(self, rows: Callable[[], PseudoRows], factors: EkfacFactors, penalty: float) -> "GaussNewton":
        return GaussNewton(rows, factors, self._iterations, self._tolerance, self._shrinkage, None, penalty)

    def whitening(self, damping: float) -> list[Whitening]:
        """Return EK-FAC's."""
        return self._factors.whitening(damping)

    def paired(self, first: Sequence[LayerGradient], second: Sequence[LayerGradient], damping: float) -> Tensor:
        """Return `uᵢᵀ (H̄ + λ)⁻¹ vᵢ` by EK-FAC."""
        return self._penalised.paired(first, second, damping)

    def quadratic(self, gradients: Sequence[LayerGradient], damping: float) -> Tensor:
        """Return `uᵢᵀ (H̄ + λ)⁻¹ uᵢ` by EK-FAC."""
        return self._penalised.quadratic(gradients, damping)


class DataInf(Curvature):
    """The mean over training examples of `(λ + g gᵀ)⁻¹`, layer by layer.

    Args:
        rows: returns the training gradients.
    """

    solves_cheaply: ClassVar[bool] = False

    def __init__(self, rows: Callable[[], PseudoRows]) -> None:
        self._rows = rows

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return the mean of inverses times v, λ a multiple of each layer's mean squared gradient.

        Raises:
            SingularCurvatureError: if λ is 0.
        """
        rows = self._rows()
        rates = [damping * unit_of_damping(value) for value in rows.mean_eigenvalues()]
        if min(rates) <= 0:
            raise SingularCurvatureError("DataInf needs a damping above 0", "/damping")
        return rows.layerwise(gradients, rates)


@dataclass
class ConjugateGradient(Curvature):
    """The Hessian over training examples, by conjugate gradients.

    Attributes:
        batches: yields the training examples used.
    """

    products: HessianProducts
    batches: Batches
    blocks: Sequence[Block]
    iterations: int
    tolerance: float

    solves_cheaply: ClassVar[bool] = False

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v`, λ a multiple of the mean eigenvalue's magnitude.

        Raises:
            SingularCurvatureError: if the curvature is not positive definite at this damping.
        """
        product = self._product
        rate = damping * abs(self._mean_eigenvalue)

        def damped(vectors: Tensor) -> Tensor:
            return product(vectors) + rate * vectors

        return _in_parts(
            gradients,
            lambda part: solvers.conjugate_gradients(
                damped, part, lambda vectors: vectors, self.iterations, self.tolerance
            ),
        )

    @cached_property
    def _mean_eigenvalue(self) -> float:
        size = sum(block.numel for block in self.blocks)
        like = next(self.products.capture.module.parameters())
        return solvers.mean_eigenvalue(self._product, size, like)

    @property
    def _product(self) -> Product:
        return product_over(self.products, self.batches, self.blocks)


@dataclass
class Lissa(Curvature):
    """The Hessian over training examples, by a stochastic Neumann series.

    Attributes:
        batches: yields one mini-batch per term.
        all_batches: yields the whole training set, to scale the series.
    """

    products: HessianProducts
    batches: Batches
    all_batches: Batches
    blocks: Sequence[Block]

    solves_cheaply: ClassVar[bool] = False

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v`, λ a multiple of the mean eigenvalue's magnitude.

        Raises:
            SingularCurvatureError: if the series diverges.
        """
        mean, largest = self._scales
        rate = damping * abs(mean)
        # Mini-batches bend more than the whole set does.
        scale = 2 * largest + rate
        terms = [self._term(batch) for batch in self.batches()]
        return _in_parts(gradients, lambda part: solvers.lissa(terms, part, rate, scale))

    @cached_property
    def _scales(self) -> tuple[float, float]:
        product = product_over(self.products, self.all_batches, self.blocks)
        size = sum(block.numel for block in self.blocks)
        like = next(self.products.capture.module.parameters())
        return solvers.mean_eigenvalue(product, size, like), solvers.largest_eigenvalue(product, size, like)

    def _term(self, batch: Batch) -> Product:
        return product_over(self.products, lambda: [batch], self.blocks)


def product_over(products: HessianProducts, batches: Batches, blocks: Sequence[Block]) -> Product:
    """Return the product with the mean Hessian over some batches, on flat vectors."""
    return lambda vectors: flattened(products.mean(batches(), unflattened(vectors, blocks)))


def _scaled(solve: Product) -> Product:
    """Return what solves vectors scaled so that each one's largest number is 1."""

    def solved(vectors: Tensor) -> Tensor:
        largest = vectors.abs().amax(dim=1, keepdim=True)
        largest = torch.where(largest > 0, largest, 1)
        return solve(vectors / largest) * largest

    return solved


def _in_parts(gradients: Sequence[Tensor], solve: Product) -> list[Tensor]:
    """Solve for a few vectors at a time; vectors do not see each other."""
    size = sum(gradient[0].numel() for gradient in gradients)
    blocks = [gradient.shape[1:] for gradient in gradients]
    rows = flattened(gradients)
    together = max(1, _NUMBERS_AT_ONCE // size, min(_VECTORS_AT_ONCE, _MOST_NUMBERS // size))
    solved = [solve(part) for part in rows.split(together)]
    found: list[list[Tensor]] = [[] for _ in blocks]
    for part in solved:
        pieces = part.split([shape.numel() for shape in blocks], dim=1)
        for number, piece in enumerate(pieces):
            found[number].append(piece.reshape(len(part), *blocks[number]))
    return [torch.cat(pieces) for pieces in found]
