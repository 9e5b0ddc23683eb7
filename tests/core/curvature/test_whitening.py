"""Whitened rows in float64: the same inner products, and the lengths that curvature gives gradients."""

import pytest
import torch
from torch import Tensor

from attribution_core.curvature.whitening import BlockWhitening, Whitening
from attribution_core.gradients import LayerGradient, Rotation
from attribution_core.method_spec import ProjectionSpec
from attribution_core.projection import build_projection
from attribution_core.projection.base import Projection
from tests.core.curvature.test_ekfac import NETWORKS, fitted, prepared

DAMPING = 0.03


class Whole(Projection):
    """Keeps every coordinate."""

    def project_range(self, values: Tensor, start: int) -> Tensor:
        projected = values.new_zeros(len(values), self.dim)
        projected[:, start : start + values.shape[1]] = values
        return projected


def given(name: str) -> tuple[Whitening, list[LayerGradient], list[Tensor], list[Tensor]]:
    """Return the whitening, gradients as factors and whole, and solved queries; eigenvectors are orthogonal to single precision."""
    capture, factors = fitted(name)
    run = capture.run(lambda module: module(prepared(name)[1]))
    gradients = run.gradients(run.output[:, 0].sin())
    whole = [gradient.materialise() for gradient in gradients]
    solved = factors.solve([part[:7].flip(0) for part in whole], DAMPING)
    return factors.whitening(DAMPING), gradients, whole, solved


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_inner_products_and_lengths_are_exact_without_a_sketch(name: str) -> None:
    whitening, gradients, whole, solved = given(name)
    everything = Whole(sum(part[0].numel() for part in whole), 0)
    rows, squares = whitening.rows(gradients, everything)
    queries = whitening.queries(solved, everything)
    expected = flat(solved) @ flat(whole).T
    assert float((queries @ rows.T - expected).norm() / expected.norm()) < 1e-5
    _, factors = fitted(name)
    torch.testing.assert_close(squares, factors.quadratic(gradients, DAMPING), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(squares, rows.square().sum(1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sketch_is_of_the_whitened_gradient(name: str) -> None:
    """However the gradients are cut into batches, and whatever of them is formed together."""
    whitening, gradients, whole, _ = given(name)
    count = sum(part[0].numel() for part in whole)
    projection = build_projection(ProjectionSpec(dim=16))
    expected = whitening.rows(gradients, Whole(count, 0))[0] @ projection.matrix(count)
    torch.testing.assert_close(whitening.rows(gradients, projection)[0], expected, rtol=1e-10, atol=1e-12)
    parts = [whitening.rows([gradient[start : start + 3] for gradient in gradients], projection) for start in (0, 3)]
    torch.testing.assert_close(torch.cat([rows for rows, _ in parts]), expected[:6], rtol=1e-10, atol=1e-12)


def test_rows_do_not_depend_on_which_eigenvectors_span_a_space() -> None:
    """Else rounding, which turns eigenvectors of equal eigenvalues into one another, would decide what a sketch mixes."""
    whitening, gradients, _, _ = given("mlp")
    block = whitening.blocks[0]
    assert block.rotation.inputs is not None
    vectors = torch.linalg.qr(block.rotation.inputs.double()).Q
    equal = block.roots.clone()
    equal[..., :2] = equal[..., :1]  # two inputs' axes with the same eigenvalues
    turn = torch.eye(block.rotation.inputs.shape[-1], dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    rotations = [Rotation(inputs, block.rotation.outputs) for inputs in (vectors, vectors @ turn)]
    found = [BlockWhitening(rotation, equal).of(gradients[0]) for rotation in rotations]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
