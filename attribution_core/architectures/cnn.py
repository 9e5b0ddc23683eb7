"""A small convolutional network."""

from torch import nn

from attribution_core.architectures.arguments import CnnArguments
from attribution_core.architectures.mlp import ACTIVATIONS


def cnn(arguments: CnnArguments) -> nn.Module:
    """Return the network, with layers `conv_0`, `conv_1`, …, `hidden` where asked for, `output`."""
    activation = ACTIVATIONS[arguments.activation]
    module = nn.Sequential()
    channels = arguments.input_shape[0]
    for number, following in enumerate(arguments.channels):
        groups = arguments.groups if number else 1
        convolution = nn.Conv2d(channels, following, arguments.kernel_size, padding="same", groups=groups)
        module.add_module(f"conv_{number}", convolution)
        module.add_module(f"activation_{number}", activation())
        module.add_module(f"pool_{number}", nn.MaxPool2d(arguments.pool))
        channels = following
    module.add_module("flatten", nn.Flatten())
    width = arguments.flat_dim
    if arguments.hidden is not None:
        module.add_module("hidden", nn.Linear(width, arguments.hidden))
        module.add_module("activation", activation())
        width = arguments.hidden
    module.add_module("output", nn.Linear(width, arguments.num_classes))
    return module
