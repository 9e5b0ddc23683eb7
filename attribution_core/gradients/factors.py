"""Per-example gradients of one layer as factors, and what is done with them without forming more than is needed.

A per-example gradient is `Σ_t g_t a_tᵀ` over positions `t` (tokens, pixels, uses of the layer). With one position it is `g aᵀ`, and sums of
squares, inner products and quadratic forms come from the factors alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# Numbers formed at once where per-example gradients must be materialised: few enough to stay in the processor's cache; of large layers as
# many as a few examples have, without which matrix products would be slow.
_NUMBERS = 1 << 20
_MOST_NUMBERS = 1 << 24
_EXAMPLES = 16
# Blocks smaller than this are flattened together.
_FLATTENED = 1 << 16
# Numbers that ghost products hold between their two factors, few enough to stay in the processor's cache, and examples taken at least.
_GHOST_NUMBERS = 1 << 20
_GHOST_EXAMPLES = 64
# Rows of an embedding per position above which its gradient is not materialised for inner products.
_SPARSE = 16


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

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, part: slice) -> "LayerGradient":
        return LayerGradient(self.block, self.inputs[part], self.outputs[part])

    @property
    def one_hot(self) -> bool:
        """Whether `outputs` holds row numbers."""
        return not self.outputs.is_floating_point()

    @property
    def has_factors(self) -> bool:
        """Whether `inputs` and `outputs` are `a` and `g` themselves."""
        return not self.one_hot

    @property
    def positions(self) -> int:
        """Terms per example."""
        return self.inputs.shape[2]

    @property
    def rank_one(self) -> bool:
        """Whether each group's gradient is one product `g aᵀ`."""
        return self.positions == 1 and not self.one_hot

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.inputs.nbytes + self.outputs.nbytes

    def compact(self) -> "LayerGradient":
        """Return the gradients whole where that takes fewer numbers than their factors, as with many positions, else as they are."""
        if self.rank_one or self.inputs[:1].numel() + self.outputs[:1].numel() <= self.block.numel:
            return self
        return DenseGradient(self.block, self.materialise(), self.inputs.new_empty(0))

    def materialise(self) -> Tensor:
        """Return the gradients, (batch, groups, d_out, d_in)."""
        if self.block.groups > 1 and self.block.d_out == 1:  # elementwise layers: too small for matrix products
            return (self.outputs * self.inputs).sum(2, keepdim=True)
        if not self.one_hot:
            return self.outputs.transpose(-1, -2) @ self.inputs
        gradients = self.inputs.new_zeros(len(self.inputs), self.block.d_out, self.block.d_in)
        rows = self.outputs.unsqueeze(-1).expand(-1, -1, self.block.d_in)  # (batch, positions, d_in)
        return gradients.scatter_add_(1, rows, self.inputs[:, 0]).unsqueeze(1)

    def materialised(self, turn: "Turn | None" = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield the gradients a few examples at a time, `(examples, (count, groups, d_out, d_in))`, in another basis if given."""
        for part in _parts(len(self), self.block.numel):
            yield part, self[part].formed(turn)

    def formed(self, turn: "Turn | None") -> Tensor:
        """Return the gradients (batch, groups, d_out, d_in), in another basis if given."""
        return self.materialise() if turn is None else turn.of(self)

    def inner(self, matrices: Tensor) -> Tensor:
        """Return inner products with `matrices` (queries, groups, d_out, d_in) as (queries, batch)."""
        # A large vocabulary's gradient is mostly zeros; a small one's costs less than gathering a row per query and position.
        if self.one_hot and self.block.d_out > _SPARSE * self.positions:
            used = matrices[:, 0, self.outputs]  # (queries, batch, positions, d_in)
            return torch.einsum("qbtd,btd->qb", used, self.inputs[:, 0])
        if self._ghost_is_cheaper(len(matrices)):
            return self._ghost(matrices)
        flat = matrices.flatten(1)
        return torch.cat([flat @ gradients.flatten(1).T for _, gradients in self.materialised()], dim=1)

    def _ghost_is_cheaper(self, queries: int) -> bool:
        # Ghost products need no gradient, but multiply each query with every position's factors: d_out · (d_in + 1) products. Whole
        # gradients take d_out · d_in per position once, and as many per query.
        ghost = queries * self.positions * (self.block.d_in + 1)
        return not self.one_hot and ghost <= self.block.d_in * (queries + self.positions)

    def _ghost(self, matrices: Tensor) -> Tensor:
        """Return `⟨M_q, Σ_t g_t a_tᵀ⟩ = Σ_t ⟨M_q a_t, g_t⟩`, (queries, batch), holding `M_q a_t` of a few queries and examples.

        Outputs that no example moves, such as those of dead ReLUs, are not multiplied.
        """
        moves = self.outputs.flatten(0, 2).any(0)
        groups, positions, d_out = self.block.groups, self.positions, int(moves.sum())
        products = self.inputs.new_zeros(len(matrices), len(self))
        if d_out == 0:
            return products
        kept = slice(None) if d_out == len(moves) else moves
        queries = max(1, min(len(matrices), _GHOST_NUMBERS // (_GHOST_EXAMPLES * positions * d_out)))
        examples = max(1, _GHOST_NUMBERS // (queries * groups * positions * d_out))
        inputs = self.inputs.transpose(0, 1)  # (groups, batch, positions, d_in)
        outputs = self.outputs[..., kept].transpose(0, 1)  # (groups, batch, positions, d_out)
        for first in range(0, len(matrices), queries):
            chosen = matrices[first : first + queries, :, kept]
            rows = chosen.transpose(0, 1).flatten(1, 2)  # (groups, queries · d_out, d_in)
            for start in range(0, len(self), examples):
                part = slice(start, start + examples)
                moved = (inputs[:, part].flatten(1, 2) @ rows.mT).view(-1, len(chosen), d_out)
                matched = outputs[:, part].flatten(0, 2).unsqueeze(-1)
                found = moved @ matched  # (groups · examples · positions, queries, 1)
                summed = found.view(groups, -1, positions, len(chosen)).sum((0, 2))
                products[first : first + queries, part] = summed.T
        return products

    def total(self, weights: Tensor | None = None) -> Tensor:
        """Return the gradients' sum over the batch, weighted by (batch,), as (groups, d_out, d_in)."""
        inputs = self.inputs if weights is None else self.inputs * weights.view(-1, 1, 1, 1)
        if self.one_hot:
            total = inputs.new_zeros(self.block.d_out, self.block.d_in)
            return total.index_add_(0, self.outputs.flatten(), inputs.flatten(0, 2)).unsqueeze(0)
        outputs = self.outputs.transpose(0, 1).flatten(1, 2)  # (groups, batch · positions, d_out)
        return outputs.transpose(1, 2) @ inputs.transpose(0, 1).flatten(1, 2)

    def scaled(self, weights: Tensor) -> "LayerGradient":
        """Return the gradients, each multiplied by its entry of (batch,)."""
        shaped = weights.view(-1, 1, 1, 1)
        if self.one_hot:
            return LayerGradient(self.block, self.inputs * shaped, self.outputs)
        return LayerGradient(self.block, self.inputs, self.outputs * shaped)

    def dense_outputs(self) -> Tensor:
        """Return `g` as (batch, groups, positions, d_out), expanding one-hot rows."""
        if not self.one_hot:
            return self.outputs
        return F.one_hot(self.outputs, self.block.d_out).to(self.inputs.dtype).unsqueeze(1)


@dataclass(frozen=True)
class DenseGradient(LayerGradient):
    """Per-example gradients that are kept whole: `inputs` is the gradient, (batch, groups, d_out, d_in), `outputs` is empty."""

    @property
    def rank_one(self) -> bool:
        """Whether each group's gradient is one product `g aᵀ`."""
        return False

    @property
    def has_factors(self) -> bool:
        """Whether `inputs` and `outputs` are `a` and `g` themselves."""
        return False

    def __getitem__(self, part: slice) -> "DenseGradient":
        return DenseGradient(self.block, self.inputs[part], self.outputs)

    def compact(self) -> "DenseGradient":
        """Return the same."""
        return self

    def materialise(self) -> Tensor:
        """Return the gradients, (batch, groups, d_out, d_in)."""
        return self.inputs

    def inner(self, matrices: Tensor) -> Tensor:
        """Return inner products with `matrices` (queries, groups, d_out, d_in) as (queries, batch)."""
        return matrices.flatten(1) @ self.inputs.flatten(1).T

    def total(self, weights: Tensor | None = None) -> Tensor:
        """Return the gradients' sum over the batch, weighted by (batch,), as (groups, d_out, d_in)."""
        return self.inputs.sum(0) if weights is None else torch.einsum("b,bgoi->goi", weights, self.inputs)

    def scaled(self, weights: Tensor) -> "DenseGradient":
        """Return the gradients, each multiplied by its entry of (batch,)."""
        return DenseGradient(self.block, self.inputs * weights.view(-1, 1, 1, 1), self.outputs)


def coordinates(
    gradients: Sequence[LayerGradient], turns: "Sequence[Turn] | None" = None, *, together: bool = True
) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield whole gradients a few examples and neighbouring blocks at a time: `(examples, first coordinate, (count, coordinates))`.

    Args:
        gradients: one entry per block.
        turns: the bases they are formed in.
        together: join small blocks.
    """
    most = _FLATTENED if together else 0
    first, number = 0, 0
    while number < len(gradients):
        start, numel = number, 0
        while number < len(gradients) and (number == start or numel + gradients[number].block.numel <= most):
            numel += gradients[number].block.numel
            number += 1
        chosen = range(start, number)
        for part in _parts(len(gradients[0]), numel):
            formed = [gradients[n][part].formed(None if turns is None else turns[n]).flatten(1) for n in chosen]
            yield part, first, formed[0] if len(formed) == 1 else torch.cat(formed, dim=1)
        first += numel


def _parts(batch: int, numel: int) -> Iterator[slice]:
    """Yield parts of a batch of gradients that are formed together."""
    step = max(1, _NUMBERS // numel, min(_EXAMPLES, _MOST_NUMBERS // numel))
    for start in range(0, batch, step):
        yield slice(start, start + step)


class Turn(Protocol):
    """A change of basis of one block."""

    def of(self, gradient: LayerGradient) -> Tensor:
        """Return materialised gradients in the new basis, (batch, groups, d_out, d_in)."""
