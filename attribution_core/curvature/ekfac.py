"""Eigenvalue-corrected Kronecker-factored curvature (EK-FAC).

Per block, with inputs `a` and pre-activation pseudo-gradients `g`: `A = Σ aaᵀ`, `G = Σ ggᵀ`, eigenbases `Q_A`, `Q_G`, and
`Λ = mean (Q_Gᵀ (Σ_t g_t a_tᵀ) Q_A)^∘2` over examples. The curvature is that of the mean loss, so `H̄ ≈ (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ`.

Sources: Martens & Grosse 2015 (K-FAC), George et al. 2018 (eigenvalue correction), Grosse et al. 2023 (sequences).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.base import Curvature, unit_of_damping
from attribution_core.curvature.whitening import Whitening
from attribution_core.errors import SingularCurvatureError
from attribution_core.gradients import Block, LayerGradient, Rotation

if TYPE_CHECKING:
    from attribution_core.curvature.group import Group

# Beyond this size a side keeps its own axes: its eigendecomposition would cost more than all else together.
MAX_ROTATED_DIM = 4096
# Sides of elementwise layers, up to which products of columns are faster than those of matrices.
_FEW = 2

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Draws(Sequence[Sequence[LayerGradient]]):
    """Pseudo-gradients `g` of one batch, whose `Σ g gᵀ` is its Fisher matrix.

    Attributes:
        parts: per drawn or enumerated label, those of all examples; or sets of those that matter. One entry per block.
        inputs: in the second case the input factors of all examples, where no objective changes them (`Pass.inputs`).
    """

    parts: Sequence[Sequence[LayerGradient]] = ()
    inputs: Sequence[LayerGradient | None] | None = None

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
        return Draws([compact(part) for part in self.parts], None if self.aligned else ())


def compact(gradients: Sequence[LayerGradient]) -> list[LayerGradient]:
    """Return each block's gradients whole where that takes fewer numbers than their factors."""
    return [gradient.compact() for gradient in gradients]


def _rotates_inputs(block: Block) -> bool:
    return block.d_in <= MAX_ROTATED_DIM


def _rotates_outputs(block: Block) -> bool:
    # One-hot output factors (embeddings) are uncorrelated as they are.
    return not block.outputs_fixed and block.d_out <= MAX_ROTATED_DIM


class CovarianceSums:
    """Sums of `aaᵀ` and `ggᵀ` per block in float64; shards add up in any grouping.

    Sides that are not rotated are not collected, but for K-FAC their traces are.

    Args:
        for_kfac: also count the positions that are not padding, which K-FAC divides by, and keep each side that is not rotated as the spectrum of
            an isotropic matrix with its trace.
    """

    def __init__(self, blocks: Sequence[Block], *, for_kfac: bool = False) -> None:
        self.blocks = list(blocks)
        self.inputs = [_zeros(b.groups, b.d_in, rotated=_rotates_inputs(b), needed=for_kfac) for b in blocks]
        self.outputs = [_zeros(b.groups, b.d_out, rotated=_rotates_outputs(b), needed=for_kfac) for b in blocks]
        self.positions = np.zeros(len(self.blocks)) if for_kfac else None

    def add(self, draws: Draws) -> None:
        """Add a batch; the inputs that all draws share are added once."""
        for number, block in enumerate(self.blocks):
            parts = [draw[number] for draw in draws]
            shared = parts[0] if draws.inputs is None else draws.inputs[number]
            inputs, outputs = self.inputs[number], self.outputs[number]
            if self.positions is not None:
                assert shared is not None
                self.positions[number] += float(shared.inputs.any(-1).sum()) / block.groups
            if inputs is not None:
                for part in [shared] if block.inputs_fixed else parts:
                    assert part is not None
                    inputs.add_(_moment(part.inputs, inputs))
            if outputs is not None and block.outputs_fixed:
                # One 1 for each position, whatever is drawn.
                assert shared is not None
                outputs.add_(_moment(shared.inputs.any(-1, keepdim=True).double(), outputs))
            elif outputs is not None:
                for part in parts:
                    outputs.add_(_moment(part.dense_outputs(), outputs))

    def arrays(self) -> Arrays:
        """Return the sums by name."""
        found = {
            f"{side}.{number}" if value.dim() == 3 else f"spectrum.{side}.{number}": value.numpy()
            for side, values in (("inputs", self.inputs), ("outputs", self.outputs))
            for number, value in enumerate(values)
            if value is not None
        }
        return found if self.positions is None else found | {"positions": self.positions}


def is_summary(name: str) -> bool:
    """Return whether a sum is no matrix: K-FAC's positions, or the spectrum of a side that is not rotated."""
    return name == "positions" or name.startswith("spectrum.")


class Eigenbasis:
    """Eigenvectors of the covariances: one rotation per block, whose sides are None where they were not collected."""

    def __init__(self, blocks: Sequence[Block], arrays: Mapping[str, np.ndarray], device: str = "cpu") -> None:
        self.blocks = list(blocks)
        self.rotations = [
            Rotation(_loaded(f"inputs.{number}", arrays, device), _loaded(f"outputs.{number}", arrays, device))
            for number in range(len(blocks))
        ]

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
            vectors = torch.where(vectors.abs() < torch.finfo(vectors.dtype).eps, 0, vectors)
            found[name], found[f"spectrum.{name}"] = vectors.float().numpy(), values.float().numpy()
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
            same_inputs = draws.aligned and parts[0].rank_one and parts[0].block.inputs_fixed
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
        turned = (turn.forward(part) for part, turn in zip(gradients, self.basis.rotations, strict=True))
        return [self._divided(number, part, damping) for number, part in enumerate(turned)]

    def solve_factored(self, gradients: Sequence[LayerGradient], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v` of gradients given as factors, which are rotated where that is cheaper."""
        solved = [part.inputs.new_empty(len(part), *part.block.shape) for part in gradients]
        for number, (part, rotation) in enumerate(zip(gradients, self.basis.rotations, strict=True)):
            for examples, rotated in part.materialised(rotation):
                solved[number][examples] = self._divided(number, rotated, damping)
        return solved

    def _divided(self, number: int, rotated: Tensor, damping: float) -> Tensor:
        return self.basis.rotations[number].back(rotated / self.damped(number, damping).to(rotated.dtype))

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
            if u.rank_one and v.rank_one:
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
            if gradient.rank_one:
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


def _summed_squares(rotation: Rotation, parts: Sequence[LayerGradient]) -> Iterator[Tensor]:
    """Yield squared rotated gradients of a batch, summed over some of its examples; several parts are of rank one, with the same inputs."""
    if parts[0].rank_one:
        yield _rank_one_squares(rotation, parts)
        return
    for _, rotated in parts[0].materialised(rotation):
        yield rotated.square().sum(0)


def _rank_one_squares(rotation: Rotation, parts: Sequence[LayerGradient]) -> Tensor:
    """Return `Σ (g')² ((a')²)ᵀ` over examples and draws, (groups, d_out, d_in); all draws share `a`."""
    outputs = torch.stack([rotation.output_factor(part).square() for part in parts]).sum(0)
    inputs = rotation.input_factor(parts[0]).square()
    return torch.einsum("bgto,bgti->goi", outputs, inputs)


def _zeros(groups: int, dim: int, *, rotated: bool, needed: bool) -> Tensor | None:
    """Return an empty sum of matrices if the side is rotated, else of spectra (groups, dim) if these are needed."""
    if rotated:
        return torch.zeros(groups, dim, dim, dtype=torch.float64)
    return torch.zeros(groups, dim, dtype=torch.float64) if needed else None


def _moment(factor: Tensor, like: Tensor) -> Tensor:
    """Return what a batch adds to a sum of matrices (groups, d, d), or to one of spectra (groups, d): its trace, evenly spread."""
    if like.dim() == 3:
        return _second_moment(factor)
    trace = factor.square().sum((0, 2, 3)).double().cpu()  # (groups,)
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
        joined = factor.transpose(0, 1).flatten(1, 2)
        moments = joined.mT @ joined
    return moments.cpu()


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(covariance)
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    return values.clamp(min=0), vectors * vectors.gather(-2, largest).sign()


def _loaded(name: str, arrays: Mapping[str, np.ndarray], device: str) -> Tensor | None:
    found = arrays.get(name)
    return None if found is None else torch.from_numpy(found).to(device)
