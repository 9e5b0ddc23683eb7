"""Eigenvalue-corrected Kronecker-factored curvature (EK-FAC).

Per block, with inputs `a` and pre-activation pseudo-gradients `g`: `A = Σ aaᵀ`, `G = Σ ggᵀ`, eigenbases `Q_A`, `Q_G`, and
`Λ = mean (Q_Gᵀ (Σ_t g_t a_tᵀ) Q_A)^∘2` over examples. The curvature is that of the mean loss, so `H̄ ≈ (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ`.

Sources: Martens & Grosse 2015 (K-FAC), George et al. 2018 (eigenvalue correction), Grosse et al. 2023 (sequences).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution_core.errors import SingularCurvatureError
from attribution_core.gradients import Block, LayerGradient

# Beyond this size a side keeps its own axes: its eigendecomposition would cost more than all else together.
MAX_ROTATED_DIM = 4096

Arrays = dict[str, np.ndarray]


def _rotates_inputs(block: Block) -> bool:
    return block.d_in <= MAX_ROTATED_DIM


def _rotates_outputs(block: Block) -> bool:
    # One-hot output factors (embeddings) are uncorrelated as they are.
    return not block.outputs_fixed and block.d_out <= MAX_ROTATED_DIM


class CovarianceSums:
    """Sums of `aaᵀ` and `ggᵀ` per block in float64; shards add up in any grouping.

    Sides that are not rotated are not collected.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        self.inputs = [_zeros(b.groups, b.d_in) if _rotates_inputs(b) else None for b in blocks]
        self.outputs = [_zeros(b.groups, b.d_out) if _rotates_outputs(b) else None for b in blocks]

    def add(self, gradients: Sequence[LayerGradient], *, first: bool) -> None:
        """Add one batch of pseudo-gradients; `first` of several on the same inputs also adds what they share."""
        for block, gradient, inputs, outputs in zip(self.blocks, gradients, self.inputs, self.outputs, strict=True):
            if inputs is not None and (first or not block.inputs_fixed):
                inputs.add_(_second_moment(gradient.inputs))
            if outputs is not None and (first or not block.outputs_fixed):
                outputs.add_(_second_moment(gradient.dense_outputs()))

    def arrays(self) -> Arrays:
        """Return the sums by name."""
        return {
            f"{side}.{number}": value.numpy()
            for side, values in (("inputs", self.inputs), ("outputs", self.outputs))
            for number, value in enumerate(values)
            if value is not None
        }


class Eigenbasis:
    """Eigenvectors of the covariances, per block (groups, d, d) with columns as vectors; None where not rotated."""

    def __init__(self, blocks: Sequence[Block], arrays: Mapping[str, np.ndarray], device: str = "cpu") -> None:
        self.blocks = list(blocks)
        self.inputs = _loaded("inputs", len(blocks), arrays, device)
        self.outputs = _loaded("outputs", len(blocks), arrays, device)

    @staticmethod
    def solve(sums: Mapping[str, np.ndarray]) -> Arrays:
        """Return the eigenvectors of summed covariances, as float32 arrays under the same names.

        Signs are fixed (largest entry positive), so that equal sums give equal bytes.
        """
        return {name: _eigenvectors(torch.from_numpy(value)).float().numpy() for name, value in sums.items()}

    def rotate(self, number: int, gradients: Tensor) -> Tensor:
        """Rotate block `number`'s gradients (…, groups, d_out, d_in) into the eigenbasis."""
        return self._turn(gradients, self.inputs[number], self.outputs[number], back=False)

    def rotate_back(self, number: int, rotated: Tensor) -> Tensor:
        """Undo `rotate`."""
        return self._turn(rotated, self.inputs[number], self.outputs[number], back=True)

    @staticmethod
    def _turn(values: Tensor, inputs: Tensor | None, outputs: Tensor | None, *, back: bool) -> Tensor:
        if inputs is not None:
            values = values @ (inputs.mT if back else inputs).to(values.dtype)
        if outputs is not None:
            values = (outputs if back else outputs.mT).to(values.dtype) @ values
        return values


class EigenvalueSums:
    """Sums over examples of squared rotated pseudo-gradients, per block, in float64."""

    def __init__(self, basis: Eigenbasis) -> None:
        self.basis = basis
        self.values = [torch.zeros(block.shape, dtype=torch.float64) for block in basis.blocks]

    def add(self, gradients: Sequence[LayerGradient]) -> None:
        """Add one batch of pseudo-gradients; positions are summed inside an example before squaring."""
        for number, gradient in enumerate(gradients):
            rotated = self.basis.rotate(number, gradient.materialise())  # (batch, groups, d_out, d_in)
            self.values[number] += rotated.square().sum(0).double().cpu()

    def arrays(self) -> Arrays:
        """Return the sums by name."""
        return {f"eigenvalues.{number}": value.numpy() for number, value in enumerate(self.values)}


@dataclass(frozen=True)
class EkfacFactors:
    """A fitted EK-FAC curvature of the mean loss.

    Attributes:
        eigenvalues: `Λ` per block, (groups, d_out, d_in).
    """

    basis: Eigenbasis
    eigenvalues: list[Tensor]

    @classmethod
    def from_arrays(
        cls, blocks: Sequence[Block], arrays: Mapping[str, np.ndarray], device: str = "cpu"
    ) -> "EkfacFactors":
        """Rebuild the factors from stored arrays."""
        eigenvalues = [torch.from_numpy(arrays[f"eigenvalues.{n}"]).to(device) for n in range(len(blocks))]
        return cls(Eigenbasis(blocks, arrays, device), eigenvalues)

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v` per block, for `v` (…, groups, d_out, d_in) in the parameters' own basis.

        Args:
            gradients: one tensor per block.
            damping: λ of each block as a multiple of the block's mean eigenvalue.

        Raises:
            SingularCurvatureError: if some eigenvalue plus its λ is 0.
        """
        solved = []
        for number, gradient in enumerate(gradients):
            divided = self.basis.rotate(number, gradient) / self.damped(number, damping).to(gradient.dtype)
            solved.append(self.basis.rotate_back(number, divided))
        return solved

    def damped(self, number: int, damping: float) -> Tensor:
        """Return `Λ + λ` of one block."""
        eigenvalues = self.eigenvalues[number]
        damped = eigenvalues + damping * eigenvalues.mean()
        if not bool((damped > 0).all()):
            raise SingularCurvatureError(
                f"the curvature of layer {self.basis.blocks[number].name} is singular: use a damping above 0",
                "/damping",
            )
        return damped


def _zeros(groups: int, dim: int) -> Tensor:
    return torch.zeros(groups, dim, dim, dtype=torch.float64)


def _second_moment(factor: Tensor) -> Tensor:
    """Sum over examples and positions of outer products: (batch, groups, positions, d) to (groups, d, d)."""
    rows = factor.transpose(0, 1).flatten(1, 2)
    return (rows.mT @ rows).double().cpu()


def _eigenvectors(covariance: Tensor) -> Tensor:
    vectors = torch.linalg.eigh(covariance).eigenvectors
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    signed: Tensor = vectors * vectors.gather(-2, largest).sign()
    return signed


def _loaded(side: str, count: int, arrays: Mapping[str, np.ndarray], device: str) -> list[Tensor | None]:
    found = [arrays.get(f"{side}.{number}") for number in range(count)]
    return [None if value is None else torch.from_numpy(value).to(device) for value in found]
