"""The rule for a module without one of its own: its parameters' gradient for each example, by running it again on what it was given.

The block is one row, `a` the gradient itself and `g = 1`: a curvature is its full matrix where that is small, and its diagonal elsewhere.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.utils.parametrize import ParametrizationList

from attribution_core.errors import UnsupportedLayerError
from attribution_core.gradients.rule import Arguments, Columns, Factors, LayerRule, Part

_PLAIN = (bool, int, float, str, type(None))
# Numbers of per-example gradients formed at once, and those of a module that is not too large to be run one example at a time.
_MAX_NUMBERS = 1 << 22


class _Forward(nn.Module):
    """A module's forward without its hooks, which have had their say in what was captured."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return self.module.forward(*arguments)


def _parts(module: nn.Module) -> tuple[Part, ...]:
    columns = tuple(Columns(name, value.numel()) for name, value in module.named_parameters(recurse=False))
    return (Part(1, 1, columns, inputs_fixed=False, outputs_fixed=True),)


def _factors(module: nn.Module, arguments: Arguments, gradients: Tensor) -> Factors:
    *given, captured = arguments
    own = {f"module.{name}": value.detach() for name, value in module.named_parameters(recurse=False)}
    batch, size = len(gradients), sum(value.numel() for value in own.values())
    each = tuple(_dimension(module, value, batch) for value in given)
    one = partial(_one, _Forward(module), own, each)
    try:
        rows, output = vmap(one, in_dims=(0, *each), chunk_size=max(1, _MAX_NUMBERS // size))(gradients, *given)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise _refused(module, f"cannot be run one example at a time: {reason}") from error
    apart = (output - captured).abs().max()
    if not bool(apart <= 100 * torch.finfo(captured.dtype).eps ** 0.75 * (1 + captured.abs().max())):
        raise _refused(module, "gives an example another output alone than in its batch")
    return rows.view(batch, 1, 1, size), gradients.new_ones(batch, 1, 1, 1)


def _one(
    forward: nn.Module, own: dict[str, Tensor], each: tuple[int | None, ...], gradient: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Return the flat gradient of one example, and the module's output for it."""
    given = tuple(value if axis is None else value.unsqueeze(0) for value, axis in zip(arguments, each, strict=True))

    def run(parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = functional_call(forward, parameters, given)
        return output.squeeze(0).to(gradient.dtype)

    differentiated: Any = vjp(run, own)
    output, pull = differentiated
    (found,) = pull(gradient)
    return torch.cat([found[name].flatten() for name in own]), output


def _dimension(module: nn.Module, value: Any, batch: int) -> int | None:
    """Return where examples are in an argument: its first dimension, or nowhere."""
    if isinstance(value, Tensor):
        return 0 if value.dim() > 0 and len(value) == batch else None
    if not isinstance(value, _PLAIN):
        raise _refused(module, f"takes a {type(value).__name__}, which cannot be divided among examples")
    return None


def _refused(module: nn.Module, reason: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(f"{type(module).__name__} has no gradient rule and {reason}; leave it out of `layers`")


def _refusal(module: nn.Module) -> str | None:
    name = type(module).__name__
    if isinstance(module, nn.RNNBase):
        return f"no rule for {name}: its output is not one tensor"
    if isinstance(module, ParametrizationList):
        return "no rule for a weight that is computed from other parameters"
    if type(module).forward is nn.Module.forward:
        return f"{name} holds parameters that other modules use"
    size = sum(value.numel() for value in module.parameters(recurse=False))
    if size > _MAX_NUMBERS:
        return f"no rule for {name}, and {size:,} parameters are too many to differentiate one example at a time"
    return None


FUNCTIONAL = LayerRule(_parts, _factors, _refusal, sees_output=True)
