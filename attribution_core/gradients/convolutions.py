"""Rules of convolutions of 1, 2 and 3 dimensions and of their transposes: positions are pixels of the output, `a` is what the kernel sees.

A transposed convolution is a convolution, with its kernel turned around, of its input set apart by zeros.
"""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from attribution_core.gradients.rule import Arguments, Factors, LayerRule, Part, weight_and_bias, with_ones


def _patches(padded: Tensor, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return what the kernel sees at each output pixel, (batch, positions, channels, kernel pixels)."""
    dims, seen = len(kernel), padded
    if dims == 2:
        unfolded: Tensor = F.unfold(padded, tuple(kernel), tuple(dilation), 0, tuple(stride))
        per_pixel: Tensor = unfolded.unflatten(1, (padded.shape[1], -1))
        return per_pixel.permute(0, 3, 1, 2)
    for axis in range(dims):
        window = dilation[axis] * (kernel[axis] - 1) + 1
        seen = seen.unfold(axis + 2, window, stride[axis])[..., :: dilation[axis]]
    return seen.flatten(2 + dims).flatten(2, 1 + dims).transpose(1, 2)


def _seen(module: _ConvNd, patches: Tensor) -> Tensor:
    """Return `a`, (batch, groups, positions, d_in)."""
    batch, positions = patches.shape[:2]
    return with_ones(patches.reshape(batch, positions, module.groups, -1).transpose(1, 2), module.bias)


def _outputs(module: _ConvNd, gradients: Tensor) -> Tensor:
    """Return `g`, (batch, groups, positions, d_out)."""
    channels = module.out_channels // module.groups
    return gradients.reshape(len(gradients), module.groups, channels, -1).transpose(2, 3)


def _conv_factors(module: _ConvNd, prepared: Arguments, gradients: Tensor) -> Factors:
    return prepared[0], _outputs(module, gradients)


def _conv_prepared(module: _ConvNd, arguments: Arguments) -> Arguments:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # The module keeps the padding of both sides of each dimension, last dimension first, for every kind of padding.
    padded = F.pad(arguments[0], module._reversed_padding_repeated_twice, mode=mode)
    return (_seen(module, _patches(padded, module.kernel_size, module.dilation, module.stride)),)


def _conv_parts(module: _ConvNd) -> tuple[Part, ...]:
    d_in = module.in_channels // module.groups * prod(module.kernel_size)
    return (weight_and_bias(module, module.groups, module.out_channels // module.groups, d_in),)


def _transpose_factors(module: _ConvTransposeNd, arguments: Arguments, gradients: Tensor) -> Factors:
    inputs: Tensor = arguments[0]
    apart = inputs.new_zeros(
        *inputs.shape[:2], *((size - 1) * step + 1 for size, step in zip(inputs.shape[2:], module.stride, strict=True))
    )
    apart[(slice(None), slice(None), *(slice(None, None, step) for step in module.stride))] = inputs
    padding: list[int] = []
    for axis, size in enumerate(gradients.shape[2:]):
        assert not isinstance(module.padding, str)
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        before = reach - module.padding[axis]
        after = size + reach - before - apart.shape[axis + 2]  # whatever output padding there was
        padding[:0] = [before, after]
    ones = [1] * len(module.kernel_size)
    patches = _patches(F.pad(apart, padding), module.kernel_size, module.dilation, ones).flip(-1)
    return _seen(module, patches), _outputs(module, gradients)


def _transpose_parts(module: _ConvTransposeNd) -> tuple[Part, ...]:
    d_in = module.in_channels // module.groups * prod(module.kernel_size)
    d_out = module.out_channels // module.groups
    return (weight_and_bias(module, module.groups, d_out, d_in, transposed=True),)


_CONVOLUTION = LayerRule(_conv_parts, _conv_factors, prepare=_conv_prepared)  # type: ignore[arg-type]
_TRANSPOSE = LayerRule(_transpose_parts, _transpose_factors)  # type: ignore[arg-type]
CONVOLUTIONS: dict[type[nn.Module], LayerRule] = {
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.ConvTranspose1d: _TRANSPOSE,
    nn.ConvTranspose2d: _TRANSPOSE,
    nn.ConvTranspose3d: _TRANSPOSE,
}
