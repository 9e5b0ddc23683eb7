"""Per-example gradients of one layer as factors, and what is done with them without forming more than is needed.

A per-example gradient is `Σ_t g_t a_tᵀ` over positions `t` (tokens, pixels, uses of the layer).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Block:
    """The parameters of one layer, laid out as `groups` matrices of (d_out, d_in).

    Attributes:
        inputs_fixed: the input factor does not depend on the objective (all layers but embeddings and tied weights).
        outputs_fixed: the output factor does not depend on the objective (embeddings: it says which row was used).
    """

    name: str
    groups: int
    d_out: int
    d_in: int
    inputs_fixed: bool = True
    outputs_fixed: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(groups, d_out, d_in)`."""
        return self.groups, self.d_out, self.d_in

    @property
    def numel(self) -> int:
        """Parameters in the block, biases included."""
        return self.groups * self.d_out * self.d_in


@dataclass(frozen=True)
class LayerGradient:
    """A batch of per-example gradients of one block, as factors.

    Attributes:
        inputs: `a`, (batch, groups, positions, d_in).
        outputs: `g`, (batch, groups, positions, d_out); or, for one-hot `g`, the row numbers (batch, positions), int64.
    """

    block: Block
    inputs: Tensor
    outputs: Tensor

    @property
    def one_hot(self) -> bool:
        """Whether `outputs` holds row numbers."""
        return not self.outputs.is_floating_point()

    def materialise(self) -> Tensor:
        """Return the gradients, (batch, groups, d_out, d_in)."""
        if not self.one_hot:
            return self.outputs.transpose(-1, -2) @ self.inputs
        gradients = self.inputs.new_zeros(len(self.inputs), self.block.d_out, self.block.d_in)
        rows = self.outputs.unsqueeze(-1).expand(-1, -1, self.block.d_in)  # (batch, positions, d_in)
        return gradients.scatter_add_(1, rows, self.inputs[:, 0]).unsqueeze(1)

    def inner(self, matrices: Tensor) -> Tensor:
        """Return inner products with `matrices` (queries, groups, d_out, d_in) as (queries, batch)."""
        if not self.one_hot:
            return matrices.flatten(1) @ self.materialise().flatten(1).T
        used = matrices[:, 0, self.outputs]  # (queries, batch, positions, d_in)
        return torch.einsum("qbtd,btd->qb", used, self.inputs[:, 0])

    def total(self, weights: Tensor | None = None) -> Tensor:
        """Return the gradients' sum over the batch, weighted by (batch,), as (groups, d_out, d_in)."""
        inputs = self.inputs if weights is None else self.inputs * weights.view(-1, 1, 1, 1)
        if self.one_hot:
            total = inputs.new_zeros(self.block.d_out, self.block.d_in)
            return total.index_add_(0, self.outputs.flatten(), inputs.flatten(0, 2)).unsqueeze(0)
        outputs = self.outputs.transpose(0, 1).flatten(1, 2)  # (groups, batch · positions, d_out)
        return outputs.transpose(1, 2) @ inputs.transpose(0, 1).flatten(1, 2)

    def dense_outputs(self) -> Tensor:
        """Return `g` as (batch, groups, positions, d_out), expanding one-hot rows."""
        if not self.one_hot:
            return self.outputs
        return F.one_hot(self.outputs, self.block.d_out).to(self.inputs.dtype).unsqueeze(1)
