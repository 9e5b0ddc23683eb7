"""Eigenvalue-corrected Kronecker-factored curvature (EK-FAC).

Per block, with inputs `a` and pre-activation pseudo-gradients `g`: `A = Σ aaᵀ`, `G = Σ ggᵀ`, eigenbases `Q_A`, `Q_G`, and
`Λ = mean (Q_Gᵀ (Σ_t g_t a_tᵀ) Q_A)^∘2` over examples. The curvature is that of the mean loss, so `H̄ ≈ (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ`.
Small blocks can have the eigenbasis of their whole matrix in place of `Q_G ⊗ Q_A`, in which Λ is exact (docs/decisions/0020-whole-layers.md).

Sources: Martens & Grosse 2015 (K-FAC), George et al. 2018 (eigenvalue correction), Grosse et al. 2023 (sequences).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.base import Curvature, unit_of_damping
from attribution_core.curvature.covariances import is_summary
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.whitening import Whitening
from attribution_core.errors import SingularCurvatureError
from attribution_core.gradients import AnyRotation, Block, LayerGradient, Rotation, WholeRotation

if TYPE_CHECKING:
    from attribution_core.curvature.group import Group

Arrays = dict[str, np.ndarray]


class Eigenbasis:
    """Eigenvectors of the covariances: one rotation per block, whose sides are None where they were not collected, or of the whole."""

    def __init__(self, blocks: Sequence[Block], arrays: Mapping[str, np.ndarray], device: str = "cpu") -> None:
        self.blocks = list(blocks)
        self.rotations = [_rotation(number, arrays, device) for number in range(len(blocks))]

    @property
    def without_inputs(self) -> list[AnyRotation]:
        """The same rotations of outputs alone where inputs have their own: turned back by these, gradients keep their inputs along the new axes."""
        return [turn if isinstance(turn, WholeRotation) else replace(turn, inputs=None) for turn in self.rotations]

    @staticmethod
    def solve(sums: Mapping[str, np.ndarray]) -> Arrays:
        """Return the eigenvectors of summed covariances as float32 arrays under the same names, and their eigenvalues as `spectrum.…`.

        Signs are fixed (largest entry positive), so that equal sums give equal bytes.
        """
        found: Arrays = {}
        for name, value in sums.items():
            if is_summary(name):
                found[name] = value.astype(np.float32)
                continue
            values, vectors = _eigen(torch.from_numpy(value))
            # What is smaller than the decomposition's own rounding is no information, and as subnormal numbers it would slow every
            # later product down tenfold.
            nothing = vectors.abs() < torch.finfo(vectors.dtype).eps
            vectors = vectors.float().contiguous().masked_fill_(nothing, 0)  # decompositions lie column by column
            found[name], found[f"spectrum.{name}"] = vectors.numpy(), values.float().numpy()
        return found


class EigenvalueSums:
    """Sums over examples of squared rotated pseudo-gradients, per block, in float64."""

    def __init__(self, basis: Eigenbasis) -> None:
        self.basis = basis
        self.values = [torch.zeros(block.shape, dtype=torch.float64) for block in basis.blocks]

    def add(self, draws: Draws) -> None:
        """Add a batch; positions are summed inside an example before squaring."""
        for number, rotation in enumerate(self.basis.rotations):
            parts = [draw[number] for draw in draws]
            by_sides = isinstance(rotation, Rotation) and draws.aligned and parts[0].rank_one
            same_inputs = by_sides and parts[0].block.inputs_fixed
            for together in [parts] if same_inputs else [[part] for part in parts]:
                for squares in _summed_squares(rotation, together):
                    self.values[number] += squares.double().cpu()

    def arrays(self) -> Arrays:
        """Return the sums by name."""
        return {f"eigenvalues.{number}": value.numpy() for number, value in enumerate(self.values)}


@dataclass(frozen=True)
class EkfacFactors(Curvature):
    """A fitted curvature of the mean loss that is diagonal in a rotated basis: EK-FAC, K-FAC, or diagonal without rotation.

    Attributes:
        eigenvalues: `Λ` per block, (groups, d_out, d_in).
        whole: what damping is a multiple of the mean of, where `eigenvalues` are those of fewer examples.
    """

    basis: Eigenbasis
    eigenvalues: list[Tensor]
    whole: list[Tensor] | None = None

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
        rotations = self.basis.rotations
        forward = (turn.forward(part) for part, turn in zip(gradients, rotations, strict=True))
        return [rotations[number].back(self._divided(number, part, damping)) for number, part in enumerate(forward)]

    def solve_factored(self, gradients: Sequence[LayerGradient], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v` of gradients given as factors, which are rotated where that is cheaper."""
        return self._solved(gradients, damping, self.basis.rotations)

    @property
    def rotations(self) -> Sequence[AnyRotation]:
        """Of each block, into the basis that the curvature is diagonal in."""
        return self.basis.rotations

    def solve_turned(self, gradients: Sequence[LayerGradient], damping: float) -> list[Tensor]:
        """Return what `solve_factored` does as `turned` has it: of a wide layer's solve, most is turning the inputs back."""
        return self._solved(gradients, damping, self.basis.without_inputs)

    def _solved(self, gradients: Sequence[LayerGradient], damping: float, backs: Sequence[AnyRotation]) -> list[Tensor]:
        solved = [part.inputs.new_empty(len(part), *part.block.shape) for part in gradients]
        for number, (part, rotation, back) in enumerate(zip(gradients, self.rotations, backs, strict=True)):
            for examples, rotated in part.materialised(rotation):
                solved[number][examples] = back.back(self._divided(number, rotated, damping))
        return solved

    def _divided(self, number: int, rotated: Tensor, damping: float) -> Tensor:
        return rotated / self.damped(number, damping).to(rotated.dtype)

    def without(self, group: "Group") -> "EkfacFactors":
        """Return the curvature less the group's share of every eigenvalue, in the same basis.

        EK-FAC's eigenvalues are sums over examples, so what is left is never negative and is what a fit of the others' eigenvalues
        would find. Subtracting the group's own matrix from an approximation that does not contain it could leave negative curvature.
        """
        sums = EigenvalueSums(self.basis)
        for draws in group.draws():
            sums.add(draws)
        shares = (part.to(kept) / group.num_examples for part, kept in zip(sums.values, self.eigenvalues, strict=True))
        left = [(kept - share).clamp(min=0) for kept, share in zip(self.eigenvalues, shares, strict=True)]
        return replace(self, eigenvalues=left, whole=self.whole or self.eigenvalues)

    def penalised(self, penalty: float) -> "EkfacFactors":
        """Return the curvature plus a multiple of the identity, damped as before."""
        left = [part + penalty for part in self.eigenvalues]
        return replace(self, eigenvalues=left, whole=self.whole or self.eigenvalues)

    def multiplied(self, gradients: Sequence[Tensor], multipliers: Sequence[Tensor]) -> list[Tensor]:
        """Return `f(H̄) v` per block, where the multipliers are `f(Λ)`, (groups, d_out, d_in) per block."""
        return [
            rotation.back(rotation.forward(gradient) * values.to(gradient.dtype))
            for gradient, rotation, values in zip(gradients, self.basis.rotations, multipliers, strict=True)
        ]

    def paired(self, first: Sequence[LayerGradient], second: Sequence[LayerGradient], damping: float) -> Tensor:
        """Return `uᵢᵀ (H̄ + λ)⁻¹ vᵢ` of each example's two gradients, (batch,)."""
        products = []
        for number, (u, v, rotation) in enumerate(zip(first, second, self.basis.rotations, strict=True)):
            inverse = self.damped(number, damping).to(u.inputs.dtype).reciprocal()
            if u.rank_one and v.rank_one and isinstance(rotation, Rotation):
                outputs = rotation.output_factor(u) * rotation.output_factor(v)  # (batch, groups, 1, d_out)
                inputs = rotation.input_factor(u) * rotation.input_factor(v)
                products.append(((outputs @ inverse) * inputs).flatten(1).sum(1))
                continue
            parts = [
                (rotated * inverse * rotation.of(v[part])).flatten(1).sum(1)
                for part, rotated in u.materialised(rotation)
            ]
            products.append(torch.cat(parts))
        return torch.stack(products).sum(0)

    def quadratic(self, gradients: Sequence[LayerGradient], damping: float) -> Tensor:
        """Return `uᵢᵀ (H̄ + λ)⁻¹ uᵢ` of each example's gradient, (batch,)."""
        products = []
        for number, (gradient, rotation) in enumerate(zip(gradients, self.basis.rotations, strict=True)):
            inverse = self.damped(number, damping).to(gradient.inputs.dtype).reciprocal()
            if gradient.rank_one and isinstance(rotation, Rotation):
                outputs, inputs = rotation.output_factor(gradient), rotation.input_factor(gradient)
                products.append(((outputs.square() @ inverse) * inputs.square()).flatten(1).sum(1))
            else:
                rotated = (rows.square_() for _, rows in gradient.materialised(rotation))
                products.append(torch.cat([rows.flatten(1) @ inverse.flatten() for rows in rotated]))
        return torch.stack(products).sum(0)

    def whitening(self, damping: float) -> list[Whitening]:
        """Return what stands for `(H̄ + λ)⁻½`, block by block."""
        turns = enumerate(self.basis.rotations)
        return [Whitening.of_eigenvalues(turn, self.damped(number, damping)) for number, turn in turns]

    def rates(self, damping: float) -> list[float]:
        """Return λ of every block."""
        return [damping * self._scale(number) for number in range(len(self.eigenvalues))]

    def _scale(self, number: int) -> float:
        """Return what one block's λ is a multiple of."""
        return unit_of_damping(float((self.whole or self.eigenvalues)[number].mean()))

    def damped(self, number: int, damping: float) -> Tensor:
        """Return `Λ + λ` of one block."""
        damped = self.eigenvalues[number] + damping * self._scale(number)
        if not bool((damped > 0).all()):
            raise SingularCurvatureError(
                f"the curvature of layer {self.basis.blocks[number].name} is singular: use a damping above 0",
                "/damping",
            )
        return damped


def concentration(eigenvalues: Iterable[np.ndarray]) -> float:
    """Return how many eigenvalues there are for each that matters: the geometric mean over parameters of each block's `d Σλ² / (Σλ)²`.

    1 where all are equal, d where one has all of the trace. Blocks without any curvature are left out.

    Args:
        eigenvalues: of each block, of several checkpoints as well.
    """
    total, count = 0.0, 0
    for each in eigenvalues:
        values = each.astype(np.float64)
        if trace := values.sum():
            total += values.size * float(np.log(values.size * np.square(values / trace).sum()))
            count += values.size
    return float(np.exp(total / max(count, 1)))


def kronecker_eigenvalues(blocks: Sequence[Block], arrays: Mapping[str, np.ndarray], num_examples: float) -> Arrays:
    """Return K-FAC's eigenvalues `λ_G λ_A` from the spectra of summed covariances, `A` a mean over positions and `G` a sum.

    Sources: Martens & Grosse 2015, section 3; Grosse & Martens 2016 and Eschenhagen et al. 2023 ("expand") for positions.
    """
    found: Arrays = {}
    for number in range(len(blocks)):
        positions = float(arrays["positions"][number]) or 1.0  # without any, there is nothing to divide
        inputs, outputs = (arrays[f"spectrum.{side}.{number}"] for side in ("inputs", "outputs"))
        product = outputs.astype(np.float64)[:, :, None] * inputs[:, None, :] / (num_examples * positions)
        found[f"eigenvalues.{number}"] = product.clip(min=0).astype(np.float32)
    return found


def _summed_squares(rotation: AnyRotation, parts: Sequence[LayerGradient]) -> Iterator[Tensor]:
    """Yield squared rotated gradients of a batch, summed over some of its examples; several parts are of rank one, with the same inputs."""
    if parts[0].rank_one and isinstance(rotation, Rotation):
        yield _rank_one_squares(rotation, parts)
        return
    for _, rotated in parts[0].materialised(rotation):
        yield rotated.square().sum(0)


def _rank_one_squares(rotation: Rotation, parts: Sequence[LayerGradient]) -> Tensor:
    """Return `Σ (g')² ((a')²)ᵀ` over examples and draws, (groups, d_out, d_in); all draws share `a`."""
    outputs = torch.stack([rotation.output_factor(part).square() for part in parts]).sum(0)
    inputs = rotation.input_factor(parts[0]).square()
    return torch.einsum("bgto,bgti->goi", outputs, inputs)


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(covariance)
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    return values.clamp(min=0), vectors.mul_(vectors.gather(-2, largest).sign())


def _rotation(number: int, arrays: Mapping[str, np.ndarray], device: str) -> AnyRotation:
    axes = _loaded(f"whole.{number}", arrays, device)
    if axes is not None:
        return WholeRotation(axes)
    return Rotation(_loaded(f"inputs.{number}", arrays, device), _loaded(f"outputs.{number}", arrays, device))


def _loaded(name: str, arrays: Mapping[str, np.ndarray], device: str) -> Tensor | None:
    found = arrays.get(name)
    return None if found is None else torch.from_numpy(found).to(device)
