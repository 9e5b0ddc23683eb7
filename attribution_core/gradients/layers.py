"""One rule per layer type: from a layer's input and output gradient to the factors of its parameter gradient.

A per-example gradient is `Σ_t g_t a_tᵀ` over positions `t` (tokens, pixels, uses of the layer). The rules only prepare `a` and `g`;
the product is formed where it is needed. A bias is a last column of ones in `a`. Normalisation layers are grouped linear layers with
one group per channel and `a = (normalised input, 1)`, so nothing downstream needs to know of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attribution_core.errors import UnsupportedLayerError

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerRule:
    """How one layer type is laid out as a block, and how its factors are made from (module, input, output gradient)."""

    shape: Callable[[nn.Module], tuple[int, int, int]]
    factors: Callable[[nn.Module, Tensor, Tensor], Factors]


def _with_ones(inputs: Tensor, bias: Tensor | None) -> Tensor:
    return inputs if bias is None else torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)


def _linear_factors(module: nn.Linear, inputs: Tensor, gradients: Tensor) -> Factors:
    batch = len(inputs)
    a = inputs.reshape(batch, 1, -1, module.in_features)
    return _with_ones(a, module.bias), gradients.reshape(batch, 1, -1, module.out_features)


def _linear_shape(module: nn.Linear) -> tuple[int, int, int]:
    return 1, module.out_features, module.in_features + (module.bias is not None)


def _conv_factors(module: nn.Conv2d, inputs: Tensor, gradients: Tensor) -> Factors:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # The module keeps the padding of both sides of each dimension, last dimension first, for every kind of padding.
    padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)  # (batch, d · groups, positions)
    batch, groups = len(inputs), module.groups
    a = patches.reshape(batch, groups, -1, patches.shape[2]).transpose(2, 3)
    g = gradients.reshape(batch, groups, module.out_channels // groups, -1).transpose(2, 3)
    return _with_ones(a, module.bias), g


def _conv_shape(module: nn.Conv2d) -> tuple[int, int, int]:
    groups, (height, width) = module.groups, module.kernel_size
    d_in = module.in_channels // groups * height * width
    return groups, module.out_channels // groups, d_in + (module.bias is not None)


def _embedding_factors(module: nn.Embedding, inputs: Tensor, gradients: Tensor) -> Factors:
    rows = inputs.reshape(len(inputs), -1)
    a = gradients.reshape(len(inputs), 1, -1, module.embedding_dim)
    if module.padding_idx is not None:
        a = a * (rows != module.padding_idx).view(len(inputs), 1, -1, 1)
    return a, rows


def _embedding_shape(module: nn.Embedding) -> tuple[int, int, int]:
    return 1, module.num_embeddings, module.embedding_dim


def _scale_factors(module: nn.Module, normalised: Tensor, gradients: Tensor) -> Factors:
    """From normalised inputs and output gradients, both (batch, positions, channels)."""
    columns = ([normalised] if module.weight is not None else []) + (
        [torch.ones_like(normalised)] if getattr(module, "bias", None) is not None else []
    )
    a = torch.stack(columns, dim=-1).transpose(1, 2)  # (batch, channels, positions, 1 or 2)
    return a, gradients.transpose(1, 2).unsqueeze(-1)


def _scale_shape(module: nn.Module) -> tuple[int, int, int]:
    parameters = list(module.parameters(recurse=False))
    return parameters[0].numel(), 1, len(parameters)


def _layer_norm_factors(module: nn.Module, inputs: Tensor, gradients: Tensor) -> Factors:
    shape = list(module.normalized_shape)  # type: ignore[arg-type]
    norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
    normalised = norm(inputs, shape, eps=module.eps)  # type: ignore[arg-type]
    size = torch.Size(shape).numel()
    return _scale_factors(module, normalised.reshape(len(inputs), -1, size), gradients.reshape(len(inputs), -1, size))


def _channels_last(values: Tensor) -> Tensor:
    return values.flatten(2).transpose(1, 2) if values.dim() > 2 else values.unsqueeze(1)


def _group_norm_factors(module: nn.GroupNorm, inputs: Tensor, gradients: Tensor) -> Factors:
    normalised = F.group_norm(inputs, module.num_groups, eps=module.eps)
    return _scale_factors(module, _channels_last(normalised), _channels_last(gradients))


def _batch_norm_factors(module: nn.BatchNorm2d, inputs: Tensor, gradients: Tensor) -> Factors:
    if module.training or module.running_mean is None:
        raise UnsupportedLayerError(
            "batch normalisation over the batch makes examples depend on each other: use eval mode"
        )
    normalised = F.batch_norm(inputs, module.running_mean, module.running_var, eps=module.eps)
    return _scale_factors(module, _channels_last(normalised), _channels_last(gradients))


RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LayerRule(_linear_shape, _linear_factors),  # type: ignore[arg-type]
    nn.Conv2d: LayerRule(_conv_shape, _conv_factors),  # type: ignore[arg-type]
    nn.Embedding: LayerRule(_embedding_shape, _embedding_factors),  # type: ignore[arg-type]
    nn.LayerNorm: LayerRule(_scale_shape, _layer_norm_factors),
    nn.RMSNorm: LayerRule(_scale_shape, _layer_norm_factors),
    nn.GroupNorm: LayerRule(_scale_shape, _group_norm_factors),  # type: ignore[arg-type]
    nn.BatchNorm1d: LayerRule(_scale_shape, _batch_norm_factors),  # type: ignore[arg-type]
    nn.BatchNorm2d: LayerRule(_scale_shape, _batch_norm_factors),  # type: ignore[arg-type]
}


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule of a module's exact type; a subclass may compute something else, so it has none."""
    return RULES.get(type(module))
