"""Products with the Hessian through every kind of layout, against differentiating the loss of named parameters twice."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from attribution_core.curvature.products import HessianProducts
from attribution_core.data.batch import Batch
from attribution_core.errors import UnsupportedLayerError
from attribution_core.gradients import GradientCapture
from attribution_core.gradients.attention import in_steps
from attribution_core.gradients.parameters import ParameterLayout
from tests.core.gradients.cases import objective, prepared

NAMES = [
    "transposed strided", "conv 3d", "embedding", "instance norm", "tied weights, own bias", "attention, other widths",
    "attention, added keys", "encoder, sequence first", "parameters of its own", "prelu, forward of its own", "bilinear",
]  # fmt: skip


class Objective:
    """Stands in for a task: only its loss is asked for."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return objective(output)


@pytest.mark.parametrize("name", NAMES)
def test_products_equal_differentiating_twice(name: str) -> None:
    module, inputs = prepared(name)
    capture = GradientCapture(module)
    layout = ParameterLayout(capture)
    parts = [torch.randn(2, *block.shape, dtype=torch.float64) for block in capture.blocks]
    batch = Batch(torch.arange(len(inputs)), inputs)
    found = HessianProducts(capture, Objective(), "hessian", 0.0).summed(batch, parts)

    named = {key: value.detach().requires_grad_() for key, value in module.named_parameters()}
    with in_steps(module):
        loss = objective(functional_call(module, named, (inputs,))).sum()
    slopes = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    vectors = layout.unpacked(parts)
    for number in range(2):
        along = sum((slope * vectors[key][number]).sum() for key, slope in zip(named, slopes, strict=True))
        bent = torch.autograd.grad(along, list(named.values()), retain_graph=True, materialize_grads=True)
        expected = layout.packed({key: value[None] for key, value in zip(named, bent, strict=True)})
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[number], theirs[0], rtol=1e-8, atol=1e-8)


def test_a_layer_without_second_derivatives_is_refused() -> None:
    module, inputs = prepared("bag sum")
    capture = GradientCapture(module)
    parts = [torch.randn(1, *block.shape, dtype=torch.float64) for block in capture.blocks]
    with pytest.raises(UnsupportedLayerError, match="no second derivatives"):
        HessianProducts(capture, Objective(), "hessian", 0.0).summed(Batch(torch.arange(5), inputs), parts)
