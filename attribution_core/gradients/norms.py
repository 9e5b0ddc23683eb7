"""Rules of normalisation layers: one group per channel, `a = (normalised input, 1)`, so nothing downstream needs to know of them."""

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from attribution_core.gradients.rule import Arguments, Columns, Factors, LayerRule, Part


def _parts(module: nn.Module) -> tuple[Part, ...]:
    parameters = dict(module.named_parameters(recurse=False))
    channels = next(iter(parameters.values())).numel()
    return (Part(channels, 1, tuple(Columns(name, 1) for name in parameters)),)


# A view of (batch, …) values as (batch, positions, channels).
Laid = Callable[[Tensor], Tensor]


def _rule(normalised: Callable[[Any, Tensor], Tensor], laid: Callable[[Any], Laid]) -> LayerRule:
    """Return the rule of a layer that scales, and may shift, what `normalised` makes of its input."""

    def prepare(module: nn.Module, arguments: Arguments) -> Arguments:
        values = laid(module)(normalised(module, arguments[0]))
        columns = {"weight": values, "bias": torch.ones_like(values)}
        used = [columns[name] for name, _ in module.named_parameters(recurse=False)]
        # Stacked in front, where that copies whole blocks of memory, and only seen as (batch, channels, positions, 1 or 2).
        return (torch.stack(used, dim=1).permute(0, 3, 2, 1),)

    def factors(module: nn.Module, prepared: Arguments, gradients: Tensor) -> Factors:
        return prepared[0], laid(module)(gradients).transpose(1, 2).unsqueeze(-1)

    return LayerRule(_parts, factors, prepare=prepare)


def _channels_last(module: nn.Module) -> Laid:
    return lambda values: values.flatten(2).transpose(1, 2) if values.dim() > 2 else values.unsqueeze(1)


def _flattened(module: nn.Module) -> Laid:
    size = next(module.parameters(recurse=False)).numel()
    return lambda values: values.reshape(len(values), -1, size)


def _layer_norm(module: nn.LayerNorm | nn.RMSNorm, inputs: Tensor) -> Tensor:
    norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
    return norm(inputs, list(module.normalized_shape), eps=module.eps)  # type: ignore[arg-type]


def _group_norm(module: nn.GroupNorm, inputs: Tensor) -> Tensor:
    return F.group_norm(inputs, module.num_groups, eps=module.eps)


def _batch_norm(module: _BatchNorm, inputs: Tensor) -> Tensor:
    return F.batch_norm(inputs, module.running_mean, module.running_var, eps=module.eps)


def _instance_norm(module: _InstanceNorm, inputs: Tensor) -> Tensor:
    own = module.training or not module.track_running_stats
    mean, variance = (None, None) if own else (module.running_mean, module.running_var)
    return F.instance_norm(inputs, mean, variance, use_input_stats=own, eps=module.eps)


def mixes_examples(module: nn.Module) -> bool:
    """Return whether a module normalises over the batch."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _slope(module: nn.Module, inputs: Tensor) -> Tensor:
    return _with(module, inputs, 1.0) - _with(module, inputs, 0.0)


@torch.no_grad()
def _with(module: nn.Module, inputs: Tensor, weight: float | Tensor) -> Tensor:
    """Return the module's output under another weight."""
    own = module.weight
    assert isinstance(own, Tensor)
    given = torch.zeros_like(own) + weight
    output: Tensor = functional_call(module, {"weight": given}, (inputs,))
    return output


# The layers of transformers that scale a normalised input, `w x̂` (Llama) or `(1 + w) x̂` (Gemma): their output is affine in the weight,
# so its slope is a difference of two outputs, whatever the class calls its parts.
SCALE = _rule(_slope, _flattened)
_scales: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def scales_elementwise(module: nn.Module) -> bool:
    """Return whether a module of transformers scales its last dimension by its weight, as tried once on random numbers."""
    if not _looks_like_a_norm(type(module)) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    if module not in _scales:
        _scales[module] = _is_affine(module)
    return _scales[module]


def _looks_like_a_norm(kind: type[nn.Module]) -> bool:
    ours = kind.__module__.startswith("transformers.") and "Norm" in kind.__name__
    return ours and len(inspect.signature(kind.forward).parameters) == 2


def _is_affine(module: nn.Module) -> bool:
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    inputs, tried = (
        torch.randn(*shape, generator=generator).to(weight) for shape in ((2, 3, len(weight)), weight.shape)
    )
    zero, one = _with(module, inputs, 0.0), _with(module, inputs, 1.0)
    return zero.shape == inputs.shape and torch.allclose(
        _with(module, inputs, tried), zero + tried * (one - zero), rtol=1e-3, atol=1e-4
    )


NORMS: dict[type[nn.Module], LayerRule] = {
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _rule(_layer_norm, _flattened)),
    nn.GroupNorm: _rule(_group_norm, _channels_last),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _rule(_batch_norm, _channels_last)),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _rule(_instance_norm, _channels_last)),
}
