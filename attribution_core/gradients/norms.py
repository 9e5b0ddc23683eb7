"""Rules of normalisation layers: one group per channel, `a = (normalised input, 1)`, so nothing downstream needs to know of them."""

import inspect
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


def _factors(module: nn.Module, normalised: Tensor, gradients: Tensor) -> Factors:
    """From normalised inputs and output gradients, both (batch, positions, channels)."""
    columns = {"weight": normalised, "bias": torch.ones_like(normalised)}
    used = [columns[name] for name, _ in module.named_parameters(recurse=False)]
    # Stacked in front, where that copies whole blocks of memory, and only seen as (batch, channels, positions, 1 or 2).
    a = torch.stack(used, dim=1).permute(0, 3, 2, 1)
    return a, gradients.transpose(1, 2).unsqueeze(-1)


def _layer_norm(module: nn.Module, arguments: Arguments, gradients: Tensor) -> Factors:
    inputs, shape = arguments[0], list(module.normalized_shape)  # type: ignore[arg-type]
    norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
    normalised = norm(inputs, shape, eps=module.eps)  # type: ignore[arg-type]
    size = torch.Size(shape).numel()
    return _factors(module, normalised.reshape(len(inputs), -1, size), gradients.reshape(len(inputs), -1, size))


def _channels_last(values: Tensor) -> Tensor:
    return values.flatten(2).transpose(1, 2) if values.dim() > 2 else values.unsqueeze(1)


def _group_norm(module: nn.GroupNorm, arguments: Arguments, gradients: Tensor) -> Factors:
    normalised = F.group_norm(arguments[0], module.num_groups, eps=module.eps)
    return _factors(module, _channels_last(normalised), _channels_last(gradients))


def _batch_norm(module: _BatchNorm, arguments: Arguments, gradients: Tensor) -> Factors:
    normalised = F.batch_norm(arguments[0], module.running_mean, module.running_var, eps=module.eps)
    return _factors(module, _channels_last(normalised), _channels_last(gradients))


def _instance_norm(module: _InstanceNorm, arguments: Arguments, gradients: Tensor) -> Factors:
    own = module.training or not module.track_running_stats
    mean, variance = (None, None) if own else (module.running_mean, module.running_var)
    normalised = F.instance_norm(arguments[0], mean, variance, use_input_stats=own, eps=module.eps)
    return _factors(module, _channels_last(normalised), _channels_last(gradients))


def mixes_examples(module: nn.Module) -> bool:
    """Return whether a module normalises over the batch."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _scale(module: nn.Module, arguments: Arguments, gradients: Tensor) -> Factors:
    normalised = _with(module, arguments[0], 1.0) - _with(module, arguments[0], 0.0)
    size = normalised.shape[-1]
    batch = len(normalised)
    return _factors(module, normalised.reshape(batch, -1, size), gradients.reshape(batch, -1, size))


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
SCALE = LayerRule(_parts, _scale)
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
    nn.LayerNorm: LayerRule(_parts, _layer_norm),
    nn.RMSNorm: LayerRule(_parts, _layer_norm),
    nn.GroupNorm: LayerRule(_parts, _group_norm),  # type: ignore[arg-type]
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), LayerRule(_parts, _batch_norm)),  # type: ignore[arg-type]
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), LayerRule(_parts, _instance_norm)),  # type: ignore[arg-type]
}
