"""Between blocks of (groups, d_out, d_in) matrices and the parameters of the modules themselves."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from attribution_core.gradients.capture import GradientCapture
from attribution_core.gradients.rule import Columns


class ParameterLayout:
    """The attributed parameters of a capture, by name, and where each lies in its block; as the layers' rules say."""

    def __init__(self, capture: GradientCapture) -> None:
        self.blocks = capture.blocks
        self._placed = capture.placed

    def parameters(self) -> dict[str, Tensor]:
        """Return the attributed parameters by their full name."""
        return {name: value.detach() for _, name, _, value in self._columns()}

    def unpacked(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return block matrices (batch, groups, d_out, d_in) as tensors (batch, *shape) by parameter name."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        starts = [0] * len(self.blocks)
        for number, name, columns, value in self._columns():
            part = matrices[number][..., starts[number] : starts[number] + columns.width]
            found[name].append(columns.unpack(part, columns.of(value).shape))  # rows come in order
            starts[number] += columns.width
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for name, parts in found.items()}

    def packed(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """Undo `unpacked`."""
        found: list[list[Tensor]] = [[] for _ in self.blocks]
        for number, name, columns, _ in self._columns():
            block, given = self.blocks[number], named[name]
            rows = given if columns.rows is None else given[:, slice(*columns.rows)]
            found[number].append(columns.pack(rows, block.groups, block.d_out))
        return [torch.cat(parts, dim=-1) for parts in found]

    def _columns(self) -> Iterator[tuple[int, str, Columns, Tensor]]:
        """Yield every block's columns: its number, the parameter's full name, the columns and the parameter."""
        for number, placed in enumerate(self._placed):
            for columns in placed.part.columns:
                yield number, placed.parameter(columns), columns, getattr(placed.module, columns.parameter)
