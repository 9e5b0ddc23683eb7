"""Every layer rule against a plain autograd loop, in float64."""

import pytest
import torch
from torch import Tensor, nn

from attribution_core.errors import InvalidInputError, UnsupportedLayerError
from attribution_core.gradients import GradientCapture
from attribution_core.gradients.parameters import ParameterLayout
from tests.core.gradients.cases import CASES, autograd_loop, close, objective, prepared


def captured(module: nn.Module, inputs: Tensor) -> tuple[GradientCapture, list[Tensor]]:
    capture = GradientCapture(module)
    run = capture.run(lambda network: network(inputs), len(inputs))
    return capture, [gradient.materialise() for gradient in run.gradients(objective(run.output))]


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_an_autograd_loop(name: str) -> None:
    module, inputs = prepared(name)
    expected = autograd_loop(module, inputs)
    plain = module(inputs)
    module.requires_grad_(False)
    capture, found = captured(module, inputs)
    run = capture.run(lambda network: network(inputs), len(inputs))
    torch.testing.assert_close(run.output, plain)
    assert capture.coverage.percent == 100
    assert [ours.shape for ours in found] == [(len(inputs), *block.shape) for block in capture.blocks]
    layout = ParameterLayout(capture)
    named = layout.unpacked(found)
    assert set(named) == set(expected)
    for parameter, ours in named.items():
        torch.testing.assert_close(
            ours, expected[parameter], rtol=1e-9, atol=1e-9, msg=lambda m, n=parameter: f"{n}: {m}"
        )
    close(layout.packed(named), found)


@pytest.mark.parametrize("name", CASES)
def test_inner_and_total_equal_the_materialised_gradients(name: str) -> None:
    module, inputs = prepared(name)
    run = GradientCapture(module).run(lambda network: network(inputs))
    for gradient in run.gradients(objective(run.output)):
        matrices, weights = torch.randn(3, *gradient.block.shape).double(), torch.randn(len(inputs)).double()
        full = gradient.materialise()
        torch.testing.assert_close(gradient.inner(matrices), torch.einsum("qgoi,bgoi->qb", matrices, full))
        torch.testing.assert_close(gradient.total(weights), torch.einsum("b,bgoi->goi", weights, full))
        torch.testing.assert_close(gradient.total(), full.sum(0))


@pytest.mark.parametrize("name", CASES)
def test_compact_gradients_are_the_same_and_never_larger(name: str) -> None:
    module, inputs = prepared(name)
    run = GradientCapture(module).run(lambda network: network(inputs))
    for gradient in run.gradients(objective(run.output)):
        small, matrices = gradient.compact(), torch.randn(3, *gradient.block.shape).double()
        held = sum(tensor.untyped_storage().nbytes() for tensor in (small.inputs, small.outputs))
        assert small is gradient or held == small.nbytes < gradient.nbytes
        assert small.compact() is small
        torch.testing.assert_close(small.materialise(), gradient.materialise())
        torch.testing.assert_close(small.inner(matrices), gradient.inner(matrices))
        torch.testing.assert_close(small.total(), gradient.total())
        weights = torch.randn(len(inputs)).double()
        torch.testing.assert_close(small.scaled(weights).materialise(), gradient.scaled(weights).materialise())


@pytest.mark.parametrize("name", CASES)
def test_gradients_depend_neither_on_the_batch_nor_on_the_run(name: str) -> None:
    module, inputs = prepared(name)
    _, whole = captured(module, inputs)
    parts = [captured(module, chunk)[1] for chunk in inputs.split(2)]
    close([torch.cat(pieces) for pieces in zip(*parts, strict=True)], whole)
    close(captured(module, inputs)[1], whole)


class SharedPositions(nn.Module):
    """Looks its positions up once for the whole batch, as several published models do."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.positions(torch.arange(6).unsqueeze(0)))


def test_a_layer_that_sees_one_row_for_all_examples() -> None:
    torch.manual_seed(0)
    module, inputs = SharedPositions().double(), torch.randn(5, 6, 4).double()
    capture = GradientCapture(module)
    expected = ParameterLayout(capture).packed(autograd_loop(module, inputs))
    run = capture.run(lambda network: network(inputs), len(inputs))
    close([gradient.materialise() for gradient in run.gradients(objective(run.output))], expected)


def test_several_objectives_on_one_pass() -> None:
    module, inputs = prepared("conv")
    run = GradientCapture(module).run(lambda network: network(inputs))
    first = run.gradients(run.output[:, 0], keep=True)
    second = run.gradients(run.output[:, 1])
    both = GradientCapture(module).run(lambda network: network(inputs))
    for a, b, ab in zip(first, second, both.gradients(both.output[:, :2].sum(1)), strict=True):
        torch.testing.assert_close(a.materialise() + b.materialise(), ab.materialise())


@pytest.mark.parametrize("layers", [["3"], ["!0"], ["*", "![0-2]"], ["[3-9]"]])
def test_a_chosen_layer_and_what_was_left_out(layers: list[str]) -> None:
    module, _ = prepared("conv")
    capture = GradientCapture(module, layers)
    assert [block.name for block in capture.blocks] == ["3"]
    assert capture.coverage.percent == pytest.approx(100 * 543 / (543 + 222), abs=1e-4)
    assert capture.coverage.skipped == ({"name": "0", "reason": "not asked for", "parameters": 222},)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LSTM(3, 3), "no rule for LSTM"),
        (nn.EmbeddingBag(5, 3, mode="max"), "largest entries"),
        (nn.Embedding(5, 3, max_norm=1.0), "changes its weights"),
        (nn.ParameterList([nn.Parameter(torch.ones(3))]), "other modules use"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False)), "computed from other parameters"),
    ],
)
def test_layers_that_cannot_be_attributed_are_named_not_guessed(module: nn.Module, reason: str) -> None:
    network = nn.Sequential(nn.Linear(3, 3), module)
    (skipped,) = GradientCapture(network).coverage.skipped
    assert skipped["name"].startswith("1")
    assert reason in skipped["reason"]
    assert skipped["parameters"] == sum(value.numel() for value in module.parameters())
    assert GradientCapture(network).coverage.percent == pytest.approx(100 * 12 / (12 + skipped["parameters"]), abs=1e-4)
    with pytest.raises(InvalidInputError, match=f"cannot be attributed: .*{reason}"):
        GradientCapture(network, [skipped["name"]])


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"no layer nothere, other\.\*"):
        GradientCapture(nn.Sequential(nn.Linear(3, 3)), ["0", "nothere", "!other.*"])


def test_weights_computed_from_others_keep_their_layer_from_its_rule() -> None:
    """The old weight normalisation leaves the class `Linear`, but its weight is no parameter."""
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(nn.Linear(5, 4)).double()
    inputs = torch.randn(3, 5).double()
    run = GradientCapture(module).run(lambda network: network(inputs), 3)
    (gradient,) = run.gradients(objective(run.output))
    assert gradient.block.shape == (1, 1, 4 + 4 + 20)


def test_a_weight_shared_in_two_layouts_is_refused() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.ConvTranspose1d(4, 4, 1, bias=False)
    second.weight = nn.Parameter(torch.randn(4, 4, 1))
    first.weight = second.weight
    with pytest.raises(UnsupportedLayerError, match="another layout"):
        GradientCapture(nn.Sequential(first, second))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_statistics_are_refused(affine: bool) -> None:
    with pytest.raises(UnsupportedLayerError, match="eval mode"):
        GradientCapture(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=affine)))
    with pytest.raises(UnsupportedLayerError, match="eval mode"):
        GradientCapture(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval())


def test_an_input_changed_in_place_is_refused() -> None:
    class Spoils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            x.mul_(2)
            return y

    with pytest.raises(UnsupportedLayerError, match="in place"):
        GradientCapture(Spoils()).run(lambda network: network(torch.randn(2, 3)))


class Inplace(nn.Module):
    """Works in place on the outputs of layers: on a leaf of the graph, on one that is not, and by an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        y = self.second(x)
        y += x
        return self.third(y.tanh_())


def test_outputs_changed_in_place_are_copied() -> None:
    network = Inplace().double()
    capture, x = GradientCapture(network), torch.randn(5, 3, dtype=torch.float64)
    for _ in range(2):  # once to find out, and once knowing
        run = capture.run(lambda module: module(x))
        found = run.gradients(run.output.square().sum(1))
        for example in range(5):
            network.zero_grad()
            network(x[example : example + 1]).square().sum().backward()
            for gradient, layer in zip(found, network.children(), strict=True):
                weight, bias = (parameter.grad for parameter in layer.parameters())
                assert weight is not None
                assert bias is not None
                whole = torch.cat([weight, bias.unsqueeze(1)], 1)
                torch.testing.assert_close(gradient.materialise()[example, 0], whole)


def test_a_pass_is_not_run_again_on_an_input_changed_in_place() -> None:
    class Doubles(Inplace):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(x)

    x = torch.randn(2, 3)
    with pytest.raises(UnsupportedLayerError, match="own input"):
        GradientCapture(Doubles()).run(lambda network: network(x))
