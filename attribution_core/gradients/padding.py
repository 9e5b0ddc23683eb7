"""Which positions of a layer's factors are padded tokens."""

from dataclasses import replace
from functools import cache
from math import prod

import torch
from torch import Tensor

from attribution_core.gradients.factors import LayerGradient


def without_padding(gradient: LayerGradient, shape: torch.Size, mask: Tensor) -> LayerGradient:
    """Return the gradients of one use of a layer with both factors of padded positions zero.

    What the objective gives them is zero already, but a sum over the other factor alone does not look at that. A dimension along which it is not
    is not that of the tokens, whatever its size; where none is, nothing is padding.

    Args:
        gradient: of the use.
        shape: of the layer's output, whose dimensions the positions are.
        mask: (batch, tokens), True where a token is real.
    """
    if gradient.block.outputs_fixed:
        return gradient  # no sum is over such factors alone
    given = gradient.inputs if gradient.one_hot else gradient.outputs
    for before, after in _places(tuple(shape[1:]), gradient.positions, mask.shape[1]):
        padded = ~mask.repeat(1, before).repeat_interleave(after, dim=1)  # (batch, positions)
        if bool(given.transpose(1, 2)[padded].any()):
            continue
        padded = padded[:, None, :, None]
        if gradient.one_hot:
            return replace(gradient, outputs=gradient.dense_outputs().masked_fill(padded, 0))
        return replace(gradient, inputs=gradient.inputs.masked_fill(padded, 0))
    return gradient


@cache
def _places(dimensions: tuple[int, ...], positions: int, tokens: int) -> list[tuple[int, int]]:
    """Return where tokens may be among the positions, the likeliest first: numbers of positions of the dimensions before and after theirs."""
    spans = [(first, last) for first in range(len(dimensions)) for last in range(first + 1, len(dimensions) + 1)]
    found = [
        (prod(dimensions[first:start]), prod(dimensions[stop:last]))
        for first, last in spans
        if prod(dimensions[first:last]) == positions
        for start, stop in spans
        if first <= start and stop <= last and prod(dimensions[start:stop]) == tokens
    ]
    return list(dict.fromkeys(found))
