"""Similarity of penultimate representations: which training examples look alike to the model. Evidence, not causation.

Source: Hanawa et al. 2021.
"""

from typing import Any

import torch
from torch import Tensor, nn

from attribution_core.data.batch import Batch
from attribution_core.errors import UnsupportedLayerError
from attribution_core.methods.base import Checkpoint, FeatureMethod, QuerySide, TrainRows
from attribution_core.methods.linear_head import last_linear

_TINY = 1e-30


class Representation(FeatureMethod):
    """Rows are inputs of the model's last linear layer, averaged over positions that are not padding; unit length for cosines."""

    shared = False

    def __init__(self, checkpoint: Checkpoint, similarity: str) -> None:
        super().__init__(checkpoint)
        _, self._head = last_linear(checkpoint.module)
        self._cosine = similarity == "cosine"

    @property
    def dim(self) -> int:
        """Width of the last linear layer's input."""
        return self._head.in_features

    def encode_train(self, batch: Batch) -> TrainRows:
        """Return the representations."""
        rows, _ = self._represent(batch)
        return TrainRows(rows, torch.ones_like(rows[:, 0]), rows.square().sum(1))

    def encode_query(self, batch: Batch) -> QuerySide:
        """Return the representations."""
        rows, output = self._represent(batch)
        return QuerySide(output, rows)

    def _represent(self, batch: Batch) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])

        handle = self._head.register_forward_pre_hook(keep)
        try:
            output = self.checkpoint.output(batch)
        finally:
            handle.remove()
        if not seen:
            raise UnsupportedLayerError("the forward pass does not use the model's last linear layer")
        rows = seen[-1]
        if rows.dim() > 2:
            rows = _mean_over_positions(rows.flatten(1, -2), batch.mask)
        if self._cosine:
            rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=_TINY)
        return rows, output


def _mean_over_positions(states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return states.mean(1)
    real = mask.unsqueeze(-1)
    return torch.where(real, states, 0).sum(1) / real.sum(1)
