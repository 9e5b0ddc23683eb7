"""What is multiplied: no parameter gradient by autograd, and the cheaper of two ways wherever there are two."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attribution_core.architectures.build import build
from attribution_core.curvature import CovarianceSums, Eigenbasis, EigenvalueSums, EkfacFactors
from attribution_core.curvature.draws import Draws
from attribution_core.gradients import Block, GradientCapture, LayerGradient, Rotation, factors
from attribution_core.method_spec import ProjectionSpec
from attribution_core.projection import build_projection
from attribution_core.spec import ArchitectureSpec

NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)), (6, 9)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)), (6, 3, 8, 8)),
    "transformer": (
        lambda: build(ArchitectureSpec(name="transformer_lm", arguments={"vocab_size": 31, "max_length": 12, "width": 16, "depth": 2, "heads": 2})),
        None,
    ),
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    return make().eval(), torch.randint(0, 31, (6, 12)) if shape is None else torch.randn(shape)


def flops(function: object) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def rows(output: Tensor) -> Tensor:
    return output.flatten(1).square().sum(1)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_parameter_gradient_is_formed(name: str) -> None:
    module, inputs = network(name)
    parameters = list(module.parameters())
    forward = flops(lambda: module(inputs))
    plain = flops(lambda: torch.autograd.grad(rows(module(inputs)).sum(), parameters))
    module.requires_grad_(False)
    capture = GradientCapture(module)

    def captured() -> None:
        run = capture.run(lambda network: network(inputs), len(inputs))
        run.gradients(rows(run.output))

    # Attention's own products have no parameters; each takes two products backwards.
    attention = 2 * 2 * 6 * 12 * 12 * 16 * 2 if name == "transformer" else 0
    parameter_gradients = forward - attention
    assert flops(captured) <= plain - parameter_gradients
    assert flops(captured) < 0.75 * plain


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_factored_features_cost_less_than_a_parameter_gradient(name: str) -> None:
    module, inputs = network(name)
    capture = GradientCapture(module, ["!*tokens", "!*positions", "!*norm"] if name == "transformer" else None)
    run = capture.run(lambda network: network(inputs), len(inputs))
    gradients = run.gradients(rows(run.output))
    projection = build_projection(ProjectionSpec(type="factored", dim=16 * len(gradients)), capture.blocks)
    whole = sum(2 * len(part) * part.positions * part.block.numel for part in gradients)
    assert flops(lambda: projection.project_gradients(gradients)) < whole


@pytest.mark.parametrize("queries", [1, 4, 40])
@pytest.mark.parametrize("positions", [1, 3, 50])
def test_inner_products_take_the_cheaper_way(positions: int, queries: int) -> None:
    torch.manual_seed(0)
    batch, d_in, d_out = 5, 7, 9
    block = Block("layer", 1, d_out, d_in)
    gradient = LayerGradient(block, torch.randn(batch, 1, positions, d_in), torch.randn(batch, 1, positions, d_out))
    matrices = torch.randn(queries, *block.shape)
    ghost = 2 * queries * batch * positions * (d_in + 1) * d_out
    whole = 2 * batch * d_in * d_out * (positions + queries)
    assert flops(lambda: gradient.inner(matrices)) == min(ghost, whole)


@pytest.mark.parametrize("held", [1, 2_000, 40_000])
@pytest.mark.parametrize(("groups", "positions"), [(1, 1), (3, 1), (2, 4)])
def test_ghost_products_are_those_of_whole_gradients(
    groups: int, positions: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few queries and examples are taken at once."""
    monkeypatch.setattr(factors, "_GHOST_NUMBERS", held)
    torch.manual_seed(0)
    block = Block("layer", groups, 4, 6)
    inputs, outputs = (torch.randn(70, groups, positions, width, dtype=torch.float64) for width in (6, 4))
    gradient = LayerGradient(block, inputs, outputs)
    matrices = torch.randn(9, *block.shape, dtype=torch.float64)
    whole = matrices.flatten(1) @ gradient.materialise().flatten(1).T
    torch.testing.assert_close(gradient._ghost(matrices), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("moving", [0, 3, 9])
def test_outputs_that_no_example_moves_cost_nothing(moving: int) -> None:
    torch.manual_seed(0)
    batch, d_in, d_out, queries = 5, 7, 9, 4
    block = Block("layer", 1, d_out, d_in)
    outputs = torch.randn(batch, 1, 1, d_out)
    outputs[..., torch.randperm(d_out)[moving:]] = 0
    gradient = LayerGradient(block, torch.randn(batch, 1, 1, d_in), outputs)
    matrices = torch.randn(queries, *block.shape)
    whole = matrices.flatten(1) @ gradient.materialise().flatten(1).T
    torch.testing.assert_close(gradient.inner(matrices), whole)
    assert flops(lambda: gradient.inner(matrices)) == 2 * queries * batch * (d_in + 1) * moving


@pytest.mark.parametrize("shape", [(4, 20), (20, 4), (12, 12)])
@pytest.mark.parametrize("positions", [1, 5, 9, 13, 40])
@pytest.mark.parametrize("sides", ["both", "inputs", "outputs"])
def test_rotated_gradients_take_the_cheaper_order(shape: tuple[int, int], positions: int, sides: str) -> None:
    torch.manual_seed(0)
    (d_in, d_out), batch = shape, 3
    block = Block("layer", 1, d_out, d_in)
    gradient = LayerGradient(block, torch.randn(batch, 1, positions, d_in), torch.randn(batch, 1, positions, d_out))
    rotation = Rotation(
        torch.linalg.qr(torch.randn(1, d_in, d_in))[0] if sides != "outputs" else None,
        torch.linalg.qr(torch.randn(1, d_out, d_out))[0] if sides != "inputs" else None,
    )
    early = flops(lambda: rotation.output_factor(gradient).mT @ rotation.input_factor(gradient))
    late = flops(lambda: rotation.forward(gradient.materialise()))
    assert flops(lambda: rotation.of(gradient)) == min(early, late)
    torch.testing.assert_close(rotation.of(gradient), rotation.forward(gradient.materialise()), rtol=1e-4, atol=1e-5)


def test_layers_without_positions_are_never_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """EK-FAC's sums, self-influence and scores of single inputs come from the factors alone."""
    module, inputs = network("mlp")
    capture = GradientCapture(module)
    run = capture.run(lambda network: network(inputs), len(inputs))
    gradients = run.gradients(rows(run.output))
    matrices = [part.materialise()[:1] for part in gradients]

    def forbidden(_: LayerGradient) -> Tensor:
        raise AssertionError("a gradient was materialised")

    monkeypatch.setattr(LayerGradient, "materialise", forbidden)
    covariances = CovarianceSums(capture.blocks)
    covariances.add(Draws([gradients]))
    basis = Eigenbasis(capture.blocks, Eigenbasis.solve(covariances.arrays()))
    eigenvalues = EigenvalueSums(basis)
    eigenvalues.add(Draws([gradients]))
    factors = EkfacFactors(basis, [value.float() for value in eigenvalues.values])
    assert bool((factors.quadratic(gradients, 0.1) > 0).all())
    assert all(part.inner(matrix).isfinite().all() for part, matrix in zip(gradients, matrices, strict=True))
