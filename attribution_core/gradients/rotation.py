"""Orthogonal changes of basis of one block: of its rows and columns each for themselves, or of all its coordinates together."""

from dataclasses import dataclass, replace

from torch import Tensor

from attribution_core.gradients.factors import LayerGradient


@dataclass(frozen=True)
class Rotation:
    """An orthogonal change of basis of one block: `Q_Gᵀ X Q_A`; a side of None keeps its axes.

    Attributes:
        inputs: `Q_A`, (groups, d_in, d_in), columns are the new axes.
        outputs: `Q_G`, (groups, d_out, d_out).
    """

    inputs: Tensor | None
    outputs: Tensor | None

    def forward(self, matrices: Tensor) -> Tensor:
        """Rotate (…, groups, d_out, d_in)."""
        if self.inputs is not None:
            matrices = _turned(matrices, self.inputs)
        return matrices if self.outputs is None else self.outputs.mT.to(matrices.dtype) @ matrices

    def back(self, matrices: Tensor) -> Tensor:
        """Undo `forward`."""
        if self.inputs is not None:
            matrices = _turned(matrices, self.inputs.mT)
        return matrices if self.outputs is None else self.outputs.to(matrices.dtype) @ matrices

    def input_factor(self, gradient: LayerGradient) -> Tensor:
        """Return `a Q_A`, (batch, groups, positions, d_in)."""
        return gradient.inputs if self.inputs is None else _turned(gradient.inputs, self.inputs)

    def output_factor(self, gradient: LayerGradient) -> Tensor:
        """Return `g Q_G`, (batch, groups, positions, d_out)."""
        outputs = gradient.dense_outputs()
        return outputs if self.outputs is None else _turned(outputs, self.outputs)

    def of(self, gradient: LayerGradient) -> Tensor:
        """Return materialised rotated gradients, (batch, groups, d_out, d_in), by the cheaper of the two orders."""
        # Either order ends in one product over the positions; they differ in what is rotated, factors or the whole gradient.
        d_in = 0 if self.inputs is None else gradient.block.d_in
        d_out = 0 if self.outputs is None else gradient.block.d_out
        early = gradient.positions * (d_in**2 + d_out**2)
        late = gradient.block.d_out * d_in**2 + gradient.block.d_in * d_out**2
        if not gradient.has_factors or early > late:
            return self.forward(gradient.materialise())
        return self.output_factor(gradient).transpose(-1, -2) @ self.input_factor(gradient)


@dataclass(frozen=True)
class WholeRotation:
    """An orthogonal change of basis of all of a block's coordinates together: `Qᵀ vec(X)`, laid out as the block again.

    Attributes:
        axes: `Q`, (numel, numel), columns are the new axes.
    """

    axes: Tensor

    def forward(self, matrices: Tensor) -> Tensor:
        """Rotate (…, groups, d_out, d_in)."""
        return _multiplied(matrices, self.axes)

    def back(self, matrices: Tensor) -> Tensor:
        """Undo `forward`."""
        return _multiplied(matrices, self.axes.mT)

    def of(self, gradient: LayerGradient) -> Tensor:
        """Return materialised rotated gradients, (batch, groups, d_out, d_in)."""
        return self.forward(gradient.materialise())


AnyRotation = Rotation | WholeRotation


def turned(gradient: LayerGradient, rotation: AnyRotation) -> LayerGradient:
    """Return gradients with their inputs along the new axes, `g (a Q_A)ᵀ`; as they are where a block's coordinates turn together."""
    if isinstance(rotation, WholeRotation):
        return gradient
    return replace(gradient, inputs=rotation.input_factor(gradient))


def _multiplied(matrices: Tensor, axes: Tensor) -> Tensor:
    return (matrices.flatten(-3) @ axes.to(matrices.dtype)).view(matrices.shape)


def _turned(rows: Tensor, matrices: Tensor) -> Tensor:
    """Return (…, groups, rows, d) times (groups, d, d), as one product where there is one group: many small ones are slow."""
    matrices = matrices.to(rows.dtype)
    if len(matrices) > 1:
        return rows @ matrices
    return (rows.flatten(0, -2) @ matrices[0]).view(rows.shape)
