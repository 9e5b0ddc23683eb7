"""Curvatures by eigenvectors over all attributed parameters at once: the whole matrix, or its leading part."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.base import Curvature
from attribution_core.curvature.group import Group
from attribution_core.curvature.products import HessianProducts
from attribution_core.curvature.vectors import flattened, unflattened
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError, SingularCurvatureError
from attribution_core.gradients import Block

MAX_EXPLICIT_PARAMETERS = 4096
_COLUMNS_AT_ONCE = 256


@dataclass(frozen=True)
class Spectral(Curvature):
    """`Σ u (uᵀv) / (λ_u + λ)` over known eigenvectors; what lies outside their span is left out.

    Attributes:
        values: eigenvalues of the mean loss's curvature, (r,).
        vectors: (P, r); all P for an explicit matrix.
        mean: mean eigenvalue over all P, in magnitude: the unit of damping.
        products: of the whole matrix, by which a group's part of it is told; None where only a leading part is known.
    """

    values: Tensor
    vectors: Tensor
    mean: float
    blocks: Sequence[Block]
    products: HessianProducts | None = None

    @classmethod
    def from_arrays(
        cls,
        blocks: Sequence[Block],
        arrays: Mapping[str, np.ndarray],
        device: str,
        products: HessianProducts | None = None,
    ) -> "Spectral":
        """Rebuild from stored arrays."""
        values, vectors = (torch.from_numpy(arrays[name]).to(device) for name in ("values", "vectors"))
        return cls(values, vectors, float(arrays["mean"][0]), blocks, products)

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v`.

        Raises:
            SingularCurvatureError: if a known eigenvalue plus λ is not positive.
        """
        damped = self.values + damping * self.mean
        if not bool((damped > 0).all()):
            raise _indefinite(float(self.values.min()), self.mean)
        rows = flattened(gradients)
        solved = ((rows.to(self.vectors) @ self.vectors) / damped) @ self.vectors.T
        return unflattened(solved.to(rows), self.blocks)

    def without(self, group: Group) -> "Matrix":
        """Return `H̄ - H_F/n`, the group's part by as many products with each of its examples as there are parameters.

        An L2 penalty in `H̄` keeps its size, as damping does.

        Raises:
            InvalidInputError: if only a part of the curvature is known.
        """
        if self.products is None:
            raise InvalidInputError("of a curvature's leading part no group's is known: use additive", "/estimator")
        share = summed_hessian(self.products, group.batches(), self.blocks) / group.num_examples
        whole = (self.vectors * self.values) @ self.vectors.T
        return Matrix(whole - torch.from_numpy((share + share.T) / 2).to(whole), self.mean, self.blocks)

    def products_without(self, count: int) -> int:
        """Return how many products of one example with one vector `without` takes of so many examples."""
        return len(self.vectors) * count

    def penalised(self, penalty: float) -> "Spectral":
        """Return the curvature plus a multiple of the identity, damped as before."""
        return replace(self, values=self.values + penalty)


@dataclass(frozen=True)
class Matrix(Curvature):
    """A curvature that is solved once: `H̄` (P, P) itself.

    Attributes:
        matrix: symmetric; it may be indefinite.
        mean: the unit of damping.
        blocks: how vectors of P numbers are laid out.
    """

    matrix: Tensor
    mean: float
    blocks: Sequence[Block]

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v`.

        Raises:
            SingularCurvatureError: if `H̄ + λ` is not positive definite.
        """
        damped = self.matrix + damping * self.mean * torch.eye(len(self.matrix)).to(self.matrix)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise _indefinite(float(torch.linalg.eigvalsh(self.matrix)[0]), self.mean)
        rows = flattened(gradients)
        solved = torch.cholesky_solve(rows.to(lower).T, lower).T
        return unflattened(solved.to(rows), self.blocks)

    def penalised(self, penalty: float) -> "Matrix":
        """Return the curvature plus a multiple of the identity, damped as before."""
        return replace(self, matrix=self.matrix + penalty * torch.eye(len(self.matrix)).to(self.matrix))


def _indefinite(smallest: float, mean: float) -> SingularCurvatureError:
    return SingularCurvatureError(
        f"the curvature is not positive definite (smallest eigenvalue {smallest:.3g}, mean {mean:.3g}): "
        "use a larger damping, or gauss_newton",
        "/damping",
    )


def summed_hessian(products: HessianProducts, batches: Iterable[Batch], blocks: Sequence[Block]) -> np.ndarray:
    """Return `Σ_i H_i` over some batches, (P, P) float64.

    Raises:
        InvalidInputError: if the model has too many parameters.
    """
    size = sum(block.numel for block in blocks)
    if size > MAX_EXPLICIT_PARAMETERS:
        raise InvalidInputError(
            f"the model has {size:,} attributed parameters; an explicit curvature takes at most {MAX_EXPLICIT_PARAMETERS:,}",
            "/method/type",
        )
    like = next(products.capture.module.parameters())
    total = np.zeros((size, size))
    for batch in batches:
        for start in range(0, size, _COLUMNS_AT_ONCE):
            columns = torch.eye(size, dtype=like.dtype, device=like.device)[start : start + _COLUMNS_AT_ONCE]
            found = flattened(products.summed(batch, unflattened(columns, blocks)))
            total[start : start + _COLUMNS_AT_ONCE] += found.double().cpu().numpy()
    return total


def spectrum(hessian: np.ndarray) -> dict[str, np.ndarray]:
    """Return eigenvalues and eigenvectors of a symmetric matrix, and the eigenvalues' mean magnitude."""
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    return {"values": values, "vectors": vectors, "mean": np.array([np.abs(values).mean()])}
