"""Whether what is captured is the model's gradient, on a few examples.

Capture relies on two things that a module's code may break unseen: an example's objective moves its own row of a layer's output alone, and a
layer's parameters are used by the layer alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from attribution_core.errors import UnsupportedLayerError
from attribution_core.gradients.capture import GradientCapture, Pass
from attribution_core.gradients.factors import LayerGradient
from attribution_core.gradients.parameters import ParameterLayout

# Differences up to this share of the terms that are summed are rounding; in half precision, whose sums torch rounds too.
_ROUNDING, _LOWERED_ROUNDING = 1e-3, 5e-2
# A layer that has a smaller share of the largest one's gradient counts as if it had this.
_LEAST = 1e-2


def check_capture(capture: GradientCapture, run: Callable[[], Pass]) -> None:
    """Refuse layers whose captured gradients are not those of their parameters.

    Args:
        capture: of the model.
        run: runs the model on a few examples, by the capture.

    Raises:
        UnsupportedLayerError: naming them.
    """
    layout = ParameterLayout(capture)
    names = list(layout.parameters())
    parameters = [capture.module.get_parameter(name) for name in names]
    with _differentiable(parameters):
        done = run()
        objective = _objective(done.output)
        for place in {0, len(objective) - 1}:
            _check_row(done, objective, place)
        captured = done.gradients(objective, keep=True)
        known = torch.autograd.grad(objective.sum(), parameters, allow_unused=True, materialize_grads=True)
    expected = layout.packed({name: value.unsqueeze(0) for name, value in zip(names, known, strict=True)})
    differing = _differing(captured, expected, _ROUNDING if capture.precision is None else _LOWERED_ROUNDING)
    if differing:
        raise UnsupportedLayerError(
            f"the parameters of {', '.join(differing)} are used outside of their layer too, where no example's gradient can be told: leave it "
            "out of `layers`"
        )


@torch.no_grad()
def _differing(captured: Sequence[LayerGradient], expected: Sequence[Tensor], rounding: float) -> list[str]:
    """Return the blocks whose gradients do not add up to those expected, (1, groups, d_out, d_in)."""
    terms = [_terms(gradient) for gradient in captured]
    return [
        gradient.block.name
        for gradient, (own,), size in zip(captured, expected, terms, strict=True)
        if float((gradient.total() - own).norm()) > rounding * max(size, _LEAST * max(terms))
    ]


def _objective(output: Tensor) -> Tensor:
    """Return a number for each example that all of its outputs (batch, …) decide."""
    generator = torch.Generator().manual_seed(0)
    return (output * torch.randn(output.shape[1:], generator=generator).to(output)).reshape(len(output), -1).sum(1)


def _check_row(done: Pass, objective: Tensor, place: int) -> None:
    """Refuse layers of whose output one example's objective moves another row."""
    outputs = [use.output for use in done.uses]
    alone = torch.autograd.grad(objective[place], outputs, retain_graph=True, allow_unused=True)
    for use, gradient in zip(done.uses, alone, strict=True):
        if gradient is None:
            continue
        rows = gradient.flatten(1).abs().amax(1)
        if float(rows.max()) > 0 and float(rows[torch.arange(len(rows)) != place].sum()) > _ROUNDING * float(
            rows.max()
        ):
            name = done.blocks[use.places[0][0]].name
            raise UnsupportedLayerError(
                f"the rows that layer {name} returns are not the examples, or these are mixed after it: leave it out of `layers`"
            )


def _terms(gradient: LayerGradient) -> float:
    """Return the length of the sum of a gradient's terms, none of which cancel."""
    outputs = gradient.outputs if gradient.one_hot else gradient.outputs.abs()
    return float(LayerGradient(gradient.block, gradient.inputs.abs(), outputs).total().norm())


@contextmanager
def _differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters take part in what is differentiated."""
    frozen = [value for value in parameters if not value.requires_grad]
    for value in frozen:
        value.requires_grad_()
    try:
        yield
    finally:
        for value in frozen:
            value.requires_grad_(False)
