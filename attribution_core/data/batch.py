"""A batch as models see it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from attribution_core.errors import InvalidInputError


@dataclass(frozen=True)
class Batch:
    """Examples ready for a model.

    Attributes:
        rows: row numbers in the data set, (batch,) int64; -1 for examples given inline.
        inputs: (batch, …).
        targets: (batch,) int64 classes, (batch, d) float values, or None when the data has none.
        mask: (batch, tokens) bool, True where a token is real; None when nothing is padded.
    """

    rows: Tensor
    inputs: Tensor
    targets: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice | Tensor) -> "Batch":
        return replace(
            self,
            rows=self.rows[part],
            inputs=self.inputs[part],
            targets=None if self.targets is None else self.targets[part],
            mask=None if self.mask is None else self.mask[part],
        )

    @classmethod
    def joined(cls, parts: Sequence["Batch"]) -> "Batch":
        """Join batches along the examples; token batches are padded to the longest.

        Raises:
            InvalidInputError: if their inputs have different shapes, or only some have targets.
        """
        if len(parts) == 1:
            return parts[0]
        if len({part.targets is None for part in parts}) > 1:
            raise InvalidInputError("some of the examples have a target and some have none")
        if all(part.mask is not None for part in parts):
            width = max(part.inputs.shape[1] for part in parts)
            parts = [part.widened(width) for part in parts]
        if len({part.inputs.shape[1:] for part in parts}) > 1:
            raise InvalidInputError("the examples' inputs have different shapes")
        return cls(
            rows=torch.cat([part.rows for part in parts]),
            inputs=torch.cat([part.inputs for part in parts]),
            targets=_joined([part.targets for part in parts]),
            mask=_joined([part.mask for part in parts]),
        )

    def widened(self, width: int) -> "Batch":
        """Return a token batch padded on the right to `width` tokens."""
        missing = width - self.inputs.shape[1]
        if self.mask is None or missing == 0:
            return self
        return replace(self, inputs=F.pad(self.inputs, (0, missing)), mask=F.pad(self.mask, (0, missing)))

    def to(self, dtype: torch.dtype) -> "Batch":
        """Return the batch with its floating-point numbers in one dtype."""

        def converted(values: Tensor) -> Tensor:
            return values.to(dtype) if values.is_floating_point() else values

        targets = None if self.targets is None else converted(self.targets)
        return replace(self, inputs=converted(self.inputs), targets=targets)

    def forward(self, module: torch.nn.Module) -> Tensor:
        """Run a model on the batch, with its mask where there is one."""
        output = module(self.inputs) if self.mask is None else module(self.inputs, mask=self.mask)
        assert isinstance(output, Tensor)
        return output


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    if len({part.shape[1:] for part in given}) > 1:
        raise InvalidInputError("the examples' targets have different shapes")
    return torch.cat(given) if given else None
