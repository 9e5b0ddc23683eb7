"""What a layer rule is: how a module's parameters are laid out as blocks, and how their gradient's factors are made."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor]
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Columns:
    """Consecutive columns of a block that hold one parameter of a module.

    Attributes:
        parameter: its name in the module.
        width: columns taken.
        transposed: the parameter is (inputs, outputs / groups, *kernel), as transposed convolutions have it, not (outputs, inputs).
        rows: only these rows of the parameter, where it packs several matrices.
    """

    parameter: str
    width: int
    transposed: bool = False
    rows: tuple[int, int] | None = None

    def of(self, value: Tensor) -> Tensor:
        """Return the part of the parameter that these columns hold."""
        return value if self.rows is None else value[slice(*self.rows)]

    def pack(self, values: Tensor, groups: int, d_out: int) -> Tensor:
        """Lay out vectors (count, *shape) of the parameter's part as (count, groups, d_out, width)."""
        if not self.transposed:
            return values.reshape(len(values), groups, d_out, self.width)
        split = values.reshape(len(values), groups, values.shape[1] // groups, d_out, -1)
        return split.transpose(2, 3).reshape(len(values), groups, d_out, self.width)

    def unpack(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """Undo `pack`."""
        if not self.transposed:
            return matrices.reshape(len(matrices), *shape)
        groups, d_out = matrices.shape[1:3]
        split = matrices.reshape(len(matrices), groups, d_out, shape[0] // groups, -1)
        return split.transpose(2, 3).reshape(len(matrices), *shape)


@dataclass(frozen=True)
class Part:
    """One block of a module's parameters: `groups` matrices (d_out, d_in), the columns named in order.

    Attributes:
        suffix: told apart from the module's other parts by this ending of its name.
        inputs_fixed, outputs_fixed: whether the factor does not depend on the objective.
        start: first column of the rule's input factor that belongs here, where one rule's columns were divided.
    """

    groups: int
    d_out: int
    columns: tuple[Columns, ...]
    suffix: str = ""
    inputs_fixed: bool = True
    outputs_fixed: bool = False
    start: int = 0

    @property
    def d_in(self) -> int:
        """Columns of all parameters together."""
        return sum(columns.width for columns in self.columns)

    def divided(self) -> list["Part"]:
        """Return one part per parameter."""
        parts, start = [], self.start
        for columns in self.columns:
            suffix = f"{self.suffix}.{columns.parameter}"
            parts.append(replace(self, columns=(columns,), suffix=suffix, start=start))
            start += columns.width
        return parts


@dataclass(frozen=True)
class LayerRule:
    """How one layer type is laid out, and how its factors are made.

    Attributes:
        parts: the blocks of a module's parameters.
        factors: `(a, g)` of the only part from (module, arguments of its forward, output gradient).
        refusal: why a module of the type cannot be attributed, None if it can.
        sees_output: the module's output follows its arguments.
        prepare: what `factors` takes in place of the arguments; made once per use of the module, however much is differentiated.
    """

    parts: Callable[[nn.Module], tuple[Part, ...]]
    factors: Callable[[nn.Module, Arguments, Tensor], Factors]
    refusal: Callable[[nn.Module], str | None] = lambda _: None
    sees_output: bool = False
    prepare: Callable[[nn.Module, Arguments], Arguments] = lambda _, arguments: arguments


def weight_and_bias(module: nn.Module, groups: int, d_out: int, d_in: int, *, transposed: bool = False) -> Part:
    """Return the part of a layer that is linear in its input: a matrix, and a bias as a last column."""
    columns = [Columns("weight", d_in, transposed)]
    if getattr(module, "bias", None) is not None:
        columns.append(Columns("bias", 1))
    return Part(groups, d_out, tuple(columns))


def with_ones(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Append the bias' input, a column of ones."""
    return inputs if bias is None else torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
