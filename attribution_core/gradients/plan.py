"""Which block every parameter is in: one per part of a layer, and one for all layers that share their parameters."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from attribution_core.errors import UnsupportedLayerError
from attribution_core.gradients.factors import Block
from attribution_core.gradients.layers import rule_for
from attribution_core.gradients.rule import Columns, Part

Places = dict[tuple[nn.Module, int], list[tuple[int, Part]]]
_Key = tuple[int, tuple[int, int] | None]


@dataclass(frozen=True)
class Placed:
    """A part of a layer that lies in a block; of several that share parameters, the first.

    Attributes:
        layer: the module's full name.
        number: of the part among the module's, before any was divided.
    """

    layer: str
    module: nn.Module
    number: int
    part: Part

    @property
    def held(self) -> list[_Key]:
        """Return which parameters, or rows of them, the part holds."""
        return [(id(getattr(self.module, columns.parameter)), columns.rows) for columns in self.part.columns]

    def parameter(self, columns: Columns) -> str:
        """Return a parameter's full name."""
        return f"{self.layer}.{columns.parameter}" if self.layer else columns.parameter

    @property
    def signature(self) -> tuple[object, ...]:
        """What two parts have in common where their gradients add up."""
        transposed = tuple(columns.transposed for columns in self.part.columns)
        return self.part.groups, self.part.d_out, transposed, *self.held


def planned(layers: Sequence[tuple[str, nn.Module]]) -> tuple[list[Block], list[Placed], Places]:
    """Return the blocks of the given layers, one part that lies in each, and where all parts lie.

    Layers that share a weight but not a bias have a block for each.

    Raises:
        UnsupportedLayerError: if layers share a weight but lay it out differently.
    """
    parts = _apart(
        [
            Placed(name, module, number, part)
            for name, module in layers
            for number, part in enumerate(rule_for(module).parts(module))
        ]
    )
    blocks: list[Block] = []
    firsts: list[Placed] = []
    places: Places = defaultdict(list)
    known: dict[tuple[object, ...], int] = {}
    for placed in parts:
        name, part = f"{placed.layer}{placed.part.suffix}", placed.part
        number = known.setdefault(placed.signature, len(blocks))
        if number == len(blocks):
            blocks.append(Block(name, part.groups, part.d_out, part.d_in, part.inputs_fixed, part.outputs_fixed))
            firsts.append(placed)
        else:
            shared = f"{blocks[number].name}+{name}"
            blocks[number] = replace(blocks[number], name=shared, inputs_fixed=False, outputs_fixed=False)
        places[placed.module, placed.number].append((number, part))
    return blocks, firsts, dict(places)


def _apart(parts: list[Placed]) -> list[Placed]:
    """Divide the parts that share only some of their parameters with another."""
    clashing = _clashing(parts)
    found = [
        divided
        for placed in parts
        for divided in (
            [replace(placed, part=part) for part in placed.part.divided()]
            if not clashing.isdisjoint(placed.held)
            else [placed]
        )
    ]
    still = _clashing(found)
    for placed in found:
        if not still.isdisjoint(placed.held):
            raise UnsupportedLayerError(
                f"layer {placed.layer} shares a weight with a layer that uses it in another layout"
            )
    return found


def _clashing(parts: Sequence[Placed]) -> set[_Key]:
    users: dict[_Key, set[tuple[object, ...]]] = defaultdict(set)
    rows: dict[int, set[bool]] = defaultdict(set)
    for placed in parts:
        for key in placed.held:
            users[key].add(placed.signature)
            rows[key[0]].add(key[1] is None)
    return {key for key, signatures in users.items() if len(signatures) > 1 or len(rows[key[0]]) > 1}
