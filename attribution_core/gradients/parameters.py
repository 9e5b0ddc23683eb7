"""Between a layer's block of (groups, d_out, d_in) matrices and the parameters of the module itself."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from attribution_core.errors import UnsupportedLayerError
from attribution_core.gradients.capture import GradientCapture

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)


class ParameterLayout:
    """The attributed parameters of a capture, by name, and where each lies in its block.

    Raises:
        UnsupportedLayerError: if a layer's parameters cannot be laid out.
    """

    def __init__(self, capture: GradientCapture) -> None:
        names = {module: name for name, module in capture.module.named_modules()}
        self.blocks = capture.blocks
        self._modules: dict[int, nn.Module] = {}
        for module, number in capture.modules.items():
            if type(module) not in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_NORMS):
                raise UnsupportedLayerError(
                    f"{type(module).__name__} has no layout of parameters: leave {names[module]} out"
                )
            self._modules.setdefault(number, module)
        self._names = {number: names[module] for number, module in self._modules.items()}

    def parameters(self) -> dict[str, Tensor]:
        """Return the attributed parameters by their full name."""
        return {
            f"{self._names[number]}.{name}": value.detach()
            for number, module in self._modules.items()
            for name, value in module.named_parameters(recurse=False)
        }

    def unpacked(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return block matrices (batch, groups, d_out, d_in) as tensors (batch, *shape) by parameter name."""
        found: dict[str, Tensor] = {}
        for number, module in self._modules.items():
            start = 0
            for name, value in module.named_parameters(recurse=False):
                width = _columns(module, name, value, self.blocks[number].d_in)
                part = matrices[number][..., start : start + width]
                found[f"{self._names[number]}.{name}"] = part.reshape(len(part), *value.shape)
                start += width
        return found

    def packed(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """Undo `unpacked`."""
        matrices = []
        for number, block in enumerate(self.blocks):
            module, columns = self._modules[number], []
            for name, value in module.named_parameters(recurse=False):
                width = _columns(module, name, value, block.d_in)
                given = named[f"{self._names[number]}.{name}"]
                columns.append(given.reshape(len(given), block.groups, block.d_out, width))
            matrices.append(torch.cat(columns, dim=-1))
        return matrices


def _columns(module: nn.Module, name: str, value: Tensor, d_in: int) -> int:
    """Return how many columns of a block a parameter takes; a bias is always one."""
    if name == "bias" or isinstance(module, _NORMS):
        return 1
    return (
        d_in
        if isinstance(module, nn.Embedding)
        else value[0].numel()
        if isinstance(module, _ConvNd)
        else value.shape[1]
    )
