"""Rules of convolutions of 1, 2 and 3 dimensions and of their transposes: positions are pixels of the output, `a` is what the kernel sees.

A transposed convolution is a convolution, with its kernel turned around, of its input set apart by zeros.
"""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from attribution_core.gradients.rule import Arguments, Factors, LayerRule, Part, weight_and_bias


def _windows(padded: Tensor, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return what the kernel sees at each output pixel as a view, (batch, channels, *pixels, *kernel)."""
    for axis, size in enumerate(kernel):
        padded = padded.unfold(axis + 2, dilation[axis] * (size - 1) + 1, stride[axis])[..., :: dilation[axis]]
    return padded


def _seen(module: _ConvNd, windows: Tensor) -> Tensor:
    """Return `a`, (batch, groups, positions, d_in): one copy, with pixels side by side as they are in the image."""
    dims, d_in = len(module.kernel_size), windows.shape[1] // module.groups * prod(module.kernel_size)
    pixels = windows.shape[2 : 2 + dims]
    columns = d_in if module.bias is None else d_in + 1
    seen = windows.new_empty(len(windows), module.groups, columns, prod(pixels))
    kernel_first = windows.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    apart = kernel_first.unflatten(1, (module.groups, -1))
    seen[:, :, :d_in].view(apart.shape).copy_(apart)
    seen[:, :, d_in:] = 1  # the bias' input
    return seen.mT


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
    return (_seen(module, _windows(padded, module.kernel_size, module.dilation, module.stride)),)


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
    windows = _windows(F.pad(apart, padding), module.kernel_size, module.dilation, ones)
    turned = windows.flip([-1 - axis for axis in range(len(ones))])
    return _seen(module, turned), _outputs(module, gradients)


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
