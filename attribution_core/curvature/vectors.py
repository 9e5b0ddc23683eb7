"""Vectors over all attributed parameters: one tensor per block, or one flat row each."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attribution_core.gradients import Block

Product = Callable[[Tensor], Tensor]
"""A symmetric operator on flat vectors, (vectors, P) to (vectors, P)."""


def flattened(parts: Sequence[Tensor]) -> Tensor:
    """Return block tensors (batch, groups, d_out, d_in) as rows (batch, P)."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def unflattened(rows: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
    """Undo `flattened`."""
    parts = rows.split([block.numel for block in blocks], dim=1)
    return [part.reshape(len(rows), *block.shape) for part, block in zip(parts, blocks, strict=True)]
