"""The multilayer perceptron."""

from torch import nn

from attribution_core.architectures.arguments import Activation, MlpArguments

ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU}


def mlp(arguments: MlpArguments) -> nn.Module:
    """Return the network, with layers `hidden_0`, `hidden_1`, …, `output`."""
    module = nn.Sequential(nn.Flatten())
    width = arguments.input_dim
    for number, following in enumerate(arguments.hidden):
        module.add_module(f"hidden_{number}", nn.Linear(width, following))
        module.add_module(f"activation_{number}", ACTIVATIONS[arguments.activation]())
        width = following
    module.add_module("output", nn.Linear(width, arguments.output_dim))
    return module
