"""Whitened gradients in float64: the same inner products, near-equal sizes, and nothing that rounding decides."""

import pytest
import torch
from torch import Tensor

from attribution_core.curvature.whitening import Whitening
from attribution_core.gradients import Block, LayerGradient, Rotation
from attribution_core.method_spec import ProjectionSpec
from attribution_core.projection import build_projection
from tests.core.curvature.test_ekfac import NETWORKS, fitted, prepared

DAMPING = 0.03


def given(name: str) -> tuple[list[Whitening], list[LayerGradient], list[Tensor], list[Tensor]]:
    """Return the whitening, gradients as factors and whole, and solved queries; eigenvectors are orthogonal to single precision."""
    capture, factors = fitted(name)
    run = capture.run(lambda module: module(prepared(name)[1]))
    gradients = run.gradients(run.output[:, 0].sin())
    whole = [gradient.materialise() for gradient in gradients]
    return factors.whitening(DAMPING), gradients, whole, factors.solve([part[:7].flip(0) for part in whole], DAMPING)


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)


def rows_of(whitening: list[Whitening], gradients: list[LayerGradient]) -> Tensor:
    return flat([block.of(gradient) for block, gradient in zip(whitening, gradients, strict=True)])


@pytest.mark.parametrize("name", NETWORKS)
def test_inner_products_are_exact_without_a_sketch(name: str) -> None:
    whitening, gradients, whole, solved = given(name)
    queries = flat([block.against(part) for block, part in zip(whitening, solved, strict=True)])
    expected = flat(solved) @ flat(whole).T
    found = queries @ rows_of(whitening, gradients).T
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_both_sides_have_the_same_moments(name: str) -> None:
    """Of Kronecker eigenvalues `W` is `(K + λ)^-½`: what it makes of `K + λ` is the identity."""
    _, factors = fitted(name)
    for turn, block in zip(factors.basis.rotations, factors.basis.blocks, strict=True):
        generator = torch.Generator().manual_seed(0)
        outputs = torch.rand(block.groups, block.d_out, 1, generator=generator, dtype=torch.float64) + 0.1
        inputs = torch.rand(block.groups, 1, block.d_in, generator=generator, dtype=torch.float64) + 0.1
        found = Whitening.of_eigenvalues(turn, outputs * inputs)
        whole = torch.eye(block.numel, dtype=torch.float64).view(-1, *block.shape)
        turned = turn.back(turn.forward(whole) * (outputs * inputs).sqrt())  # (K + λ)^½
        back = found.sides.forward(turned)
        if found.scale is not None:
            back = back * found.scale
        torch.testing.assert_close(back, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sketch_is_of_the_whitened_gradient(name: str) -> None:
    """However the gradients are cut into batches, and whatever of them is formed together."""
    whitening, gradients, whole, _ = given(name)
    count = sum(part[0].numel() for part in whole)
    for kind in ("sjlt", "gaussian"):
        projection = build_projection(ProjectionSpec(type=kind, dim=16))
        expected = rows_of(whitening, gradients) @ projection.matrix(count)
        found = projection.project_gradients(gradients, whitening)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        parts = [[gradient[start : start + 3] for gradient in gradients] for start in (0, 3)]
        halves = [projection.project_gradients(part, whitening) for part in parts]
        torch.testing.assert_close(torch.cat(halves), expected[:6], rtol=1e-10, atol=1e-12)


def test_rows_do_not_depend_on_which_eigenvectors_span_a_space() -> None:
    """Else rounding, which turns eigenvectors of equal eigenvalues into one another, would decide what a sketch mixes."""
    _, factors = fitted("mlp")
    _, gradients, _, _ = given("mlp")
    rotation, damped = factors.basis.rotations[0], factors.damped(0, DAMPING)
    assert rotation.inputs is not None
    vectors = torch.linalg.qr(rotation.inputs.double()).Q
    damped[..., :2] = damped[..., :1].clone()  # two inputs' axes with the same eigenvalues
    turn = torch.eye(len(vectors[0]), dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    bases = [Rotation(inputs, rotation.outputs) for inputs in (vectors, vectors @ turn)]
    found = [Whitening.of_eigenvalues(basis, damped).of(gradients[0]) for basis in bases]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smallest", [1e-3, 1e-9])
def test_inner_products_survive_rounding(smallest: float) -> None:
    """In single precision, whatever the range of eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.linalg.qr(torch.randn(1, 64, 64, generator=generator)).Q for _ in range(2)]
    spectrum = torch.logspace(-12, 0, 64)
    damped = spectrum[:, None] * spectrum + smallest
    whitening = Whitening.of_eigenvalues(Rotation(*vectors), damped[None])
    block = Block("layer", 1, 64, 64)
    inputs, outputs = torch.randn(2, 8, 1, 1, 64, generator=generator)
    gradient = LayerGradient(block, inputs * spectrum.sqrt(), outputs * spectrum.sqrt())
    solved = torch.randn(5, 1, 64, 64, generator=generator)
    found = whitening.against(solved).flatten(1) @ whitening.of(gradient).flatten(1).T
    expected = solved.flatten(1) @ gradient.materialise().flatten(1).T
    assert float((found - expected).norm() / expected.norm()) < 0.02
