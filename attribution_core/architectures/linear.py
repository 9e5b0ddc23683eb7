"""Linear and logistic regression."""

from torch import nn

from attribution_core.architectures.arguments import LinearArguments, LogisticArguments


def linear(arguments: LinearArguments) -> nn.Module:
    """Return one affine map: `output.weight`, `output.bias`."""
    return _affine(arguments.input_dim, arguments.output_dim, arguments.bias)


def logistic(arguments: LogisticArguments) -> nn.Module:
    """Return one affine map to class logits: `output.weight`, `output.bias`."""
    return _affine(arguments.input_dim, arguments.num_classes, arguments.bias)


def _affine(inputs: int, outputs: int, bias: bool) -> nn.Module:
    module = nn.Sequential(nn.Flatten())
    module.add_module("output", nn.Linear(inputs, outputs, bias=bias))
    return module
