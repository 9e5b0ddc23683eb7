"""Every layer rule against a plain autograd loop, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attribution_core.errors import InvalidInputError, UnsupportedLayerError
from attribution_core.gradients import GradientCapture


def conv(**options: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, **options), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)
    )


class Twice(nn.Module):
    """Uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(torch.tanh(self.shared(x))))


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.embed(tokens))))


class Residual(nn.Module):
    """Adds in place to a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 5), nn.RMSNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        y += x
        return self.second(y)


def images() -> Tensor:
    return torch.randn(5, 4, 7, 8)


def tokens() -> Tensor:
    return torch.randint(0, 11, (5, 6))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(5, 3), lambda: torch.randn(5, 5)),
    "linear on sequences": (
        lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.GELU(), nn.Linear(4, 3)),
        lambda: torch.randn(5, 7, 5),
    ),
    "conv": (conv, images),
    "conv strided, dilated": (lambda: conv(stride=2, dilation=2, padding=(1, 2), bias=False), images),
    "conv same": (lambda: conv(padding="same"), images),
    "conv reflect": (lambda: conv(padding=2, padding_mode="reflect"), images),
    "conv circular": (lambda: conv(padding=1, padding_mode="circular", stride=(1, 2)), images),
    "conv grouped": (lambda: conv(groups=2, padding=1), images),
    "conv depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Flatten(), nn.Linear(240, 2)), images),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 6, padding_idx=3), nn.Linear(6, 2)), tokens),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
        lambda: torch.randn(5, 3, 5),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(180, 2)),
        images,
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(180, 2)),
        images,
    ),
    "batch norm 1d": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)),
        lambda: torch.randn(5, 5),
    ),
    "a layer used twice": (Twice, lambda: torch.randn(5, 5)),
    "tied weights": (Tied, tokens),
    "in-place residual": (Residual, lambda: torch.randn(5, 5)),
}


def objective(output: Tensor) -> Tensor:
    return torch.sin(output).flatten(1).cumsum(1).square().sum(1)


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, inputs = CASES[name]
    module = build().double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    if isinstance(
        batch_norm := next((m for m in module.modules() if isinstance(m, nn.BatchNorm2d)), None), nn.BatchNorm2d
    ):
        nn.init.normal_(batch_norm.running_mean)
        nn.init.uniform_(batch_norm.running_var, 0.5, 2)
    values = inputs()
    return module, values.double() if values.is_floating_point() else values


def autograd_loop(module: nn.Module, capture: GradientCapture, inputs: Tensor) -> list[Tensor]:
    """Per-example gradients by one backward pass each, in the blocks' layout."""
    modules = dict(module.named_modules())
    rows = []
    for example in inputs:
        module.zero_grad()
        objective(module(example.unsqueeze(0))).sum().backward()
        rows.append([_as_block(modules[block.name.split("+")[0]], block.shape) for block in capture.blocks])
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _as_block(module: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
        weight = module.weight.grad.reshape(shape[0], shape[1], -1)
        bias = getattr(module, "bias", None)
        return weight if bias is None else torch.cat([weight, bias.grad.reshape(shape[0], shape[1], 1)], dim=2)
    return torch.stack([p.grad.flatten() for p in module.parameters()], dim=1).unsqueeze(1)


def captured(module: nn.Module, inputs: Tensor) -> tuple[GradientCapture, list[Tensor]]:
    capture = GradientCapture(module)
    run = capture.run(lambda network: network(inputs))
    return capture, [gradient.materialise() for gradient in run.gradients(objective(run.output))]


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_an_autograd_loop(name: str) -> None:
    module, inputs = prepared(name)
    capture = GradientCapture(module)
    expected = autograd_loop(module, capture, inputs)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    _, found = captured(module, inputs)
    assert capture.coverage.percent == 100
    for block, ours, theirs in zip(capture.blocks, found, expected, strict=True):
        assert ours.shape == (len(inputs), *block.shape)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


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


def test_gradients_do_not_depend_on_the_batch() -> None:
    module, inputs = prepared("conv grouped")
    _, whole = captured(module, inputs)
    parts = [captured(module, chunk)[1] for chunk in inputs.split(2)]
    for block, pieces in enumerate(zip(*parts, strict=True)):
        torch.testing.assert_close(torch.cat(pieces), whole[block], rtol=1e-12, atol=1e-12)


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
    expected = autograd_loop(module, capture, inputs)
    run = capture.run(lambda network: network(inputs), len(inputs))
    for ours, theirs in zip(run.gradients(objective(run.output)), expected, strict=True):
        torch.testing.assert_close(ours.materialise(), theirs, rtol=1e-10, atol=1e-10)


def test_several_objectives_on_one_pass() -> None:
    module, inputs = prepared("conv")
    run = GradientCapture(module).run(lambda network: network(inputs))
    first = run.gradients(run.output[:, 0], keep=True)
    second = run.gradients(run.output[:, 1])
    both = GradientCapture(module).run(lambda network: network(inputs))
    for a, b, ab in zip(first, second, both.gradients(both.output[:, :2].sum(1)), strict=True):
        torch.testing.assert_close(a.materialise() + b.materialise(), ab.materialise())


def test_a_chosen_layer_and_what_was_left_out() -> None:
    module, _ = prepared("conv")
    capture = GradientCapture(module, ["4"])
    assert [block.name for block in capture.blocks] == ["4"]
    assert capture.coverage.percent == pytest.approx(100 * 75 / (75 + 6 * 4 * 9 + 6), abs=1e-4)
    assert capture.coverage.skipped == ({"name": "0", "reason": "not asked for", "parameters": 222},)


def test_layers_without_a_rule_are_named_not_guessed() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.PReLU(), nn.Linear(3, 2))
    assert [skipped["name"] for skipped in GradientCapture(module).coverage.skipped] == ["1"]
    with pytest.raises(InvalidInputError, match="no layer nothere"):
        GradientCapture(module, ["nothere"])
    with pytest.raises(InvalidInputError, match="no gradient rule"):
        GradientCapture(module, ["1"])


def test_batch_statistics_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="eval mode"):
        GradientCapture(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_an_input_changed_in_place_is_refused() -> None:
    class Spoils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            x.mul_(2)
            return y

    run = GradientCapture(Spoils()).run(lambda network: network(torch.randn(2, 3)))
    with pytest.raises(UnsupportedLayerError, match="in place"):
        run.gradients(run.output.sum(1))
