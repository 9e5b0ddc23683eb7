"""The basis in which gradients are sketched: training gradients as `W φ`, what they are multiplied with as `W⁻¹ v`.

Inner products are what they were, but errors are not. Along an axis with eigenvalue κ training gradients have a second moment in proportion to κ, and
solved queries `v = (K + λ)⁻¹ ∇m` one in proportion to `κ / (κ + λ)²`: in the parameters' own basis a few axes have nearly all of the rows' length, and
others nearly all of the queries'. The error of a random projection, or of a scale per row, grows with the product of both lengths, which is smallest
for `W = (K + λ)^-½`. Here `K + λ` is replaced by the product of one number per row and one per column of its eigenvalues that has the same means, so that
`W` is a symmetric matrix per side, `S_G ⊗ S_A`, applied to factors. (Blocks with a basis of their whole have the root itself.) Being symmetric it depends
on the matrix `K`, not on which eigenvectors rounding picks for eigenvalues that are nearly equal.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from attribution_core.gradients import AnyRotation, LayerGradient, Rotation, WholeRotation

# Of a side's largest mean eigenvalue.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Whitening:
    """`W` of one block.

    Attributes:
        sides: `S_A` and `S_G`, where the block has a basis of its own; or `W` itself.
        inverse: their inverses.
        scale: what is left of `W` on sides that keep their axes, (groups, d_out or 1, d_in or 1); None where there are none.
    """

    sides: AnyRotation
    inverse: AnyRotation
    scale: Tensor | None

    @classmethod
    def of_eigenvalues(cls, basis: AnyRotation, damped: Tensor) -> "Whitening":
        """Return `W` from eigenvectors and `K + λ`, (groups, d_out, d_in) and above 0."""
        if isinstance(basis, WholeRotation):
            roots = _roots(damped.flatten())
            root, inverse_root = (WholeRotation(_product(basis.axes, values)) for values in (roots, 1 / roots))
            return cls(root, inverse_root, None)
        share = damped.mean((-2, -1), keepdim=True).pow(0.25)
        inputs = _roots(damped.mean(-2, keepdim=True)) * share  # (groups, 1, d_in)
        outputs = _roots(damped.mean(-1, keepdim=True)) * share  # (groups, d_out, 1)
        kept = [side for side, axes in ((inputs, basis.inputs), (outputs, basis.outputs)) if axes is None]
        scale = prod(kept[1:], start=kept[0]) if kept else None
        sides = [_symmetric(basis.inputs, inputs.squeeze(-2)), _symmetric(basis.outputs, outputs.squeeze(-1))]
        inverse = [
            _symmetric(basis.inputs, 1 / inputs.squeeze(-2)),
            _symmetric(basis.outputs, 1 / outputs.squeeze(-1)),
        ]
        return cls(Rotation(*sides), Rotation(*inverse), scale)

    def of(self, gradient: LayerGradient) -> Tensor:
        """Return `W φ`, (batch, groups, d_out, d_in)."""
        turned = self.sides.of(gradient)
        return turned if self.scale is None else turned * self.scale.to(turned.dtype)

    def against(self, matrices: Tensor) -> Tensor:
        """Return `W⁻¹ v`, what `W φ` is multiplied with, for `v` (…, groups, d_out, d_in)."""
        turned = self.inverse.forward(matrices)
        return turned if self.scale is None else turned / self.scale.to(turned.dtype)


def _roots(means: Tensor) -> Tensor:
    """Return `x^-½`, of no less than a share of the largest: what a side is multiplied with and divided by again must not be rounded away."""
    return means.clamp(min=_SMALLEST * float(means.max())).rsqrt()


def _symmetric(vectors: Tensor | None, values: Tensor) -> Tensor | None:
    return None if vectors is None else _product(vectors, values)


def _product(vectors: Tensor, values: Tensor) -> Tensor:
    """Return `Q diag(values) Qᵀ`, (…, d, d)."""
    return (vectors * values.unsqueeze(-2).to(vectors)) @ vectors.mT
