"""ResNet-9, the residual network of fast CIFAR training (Page 2018)."""

from torch import Tensor, nn

from attribution_core.architectures.arguments import Resnet9Arguments


class Residual(nn.Module):
    """Two convolution blocks around which the input is added."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.first = _block(channels, channels, norm)
        self.second = _block(channels, channels, norm)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `inputs + second(first(inputs))`."""
        output: Tensor = inputs + self.second(self.first(inputs))
        return output


def resnet9(arguments: Resnet9Arguments) -> nn.Module:
    """Return the network; the head is the layer `output`."""
    width, norm = arguments.width, arguments.norm
    module = nn.Sequential()
    module.add_module("stem", _block(arguments.input_channels, width, norm))
    module.add_module("stage_1", _block(width, 2 * width, norm, pool=True))
    module.add_module("residual_1", Residual(2 * width, norm))
    module.add_module("stage_2", _block(2 * width, 4 * width, norm, pool=True))
    module.add_module("stage_3", _block(4 * width, 4 * width, norm, pool=True))
    module.add_module("residual_3", Residual(4 * width, norm))
    module.add_module("pool", nn.AdaptiveMaxPool2d(1))
    module.add_module("flatten", nn.Flatten())
    module.add_module("output", nn.Linear(4 * width, arguments.num_classes))
    return module


def _block(inputs: int, outputs: int, norm: str, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm == "none")]
    if norm != "none":
        layers.append(nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(4, outputs))
    layers.append(nn.ReLU())
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
