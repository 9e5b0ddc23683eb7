"""What is captured is compared with autograd on a few examples: right models pass, and code that breaks what capture relies on is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attribution_core.errors import UnsupportedLayerError
from attribution_core.gradients import GradientCapture
from attribution_core.gradients.self_check import check_capture
from tests.core.gradients.cases import CASES, prepared
from tests.core.gradients.test_capture import SharedPositions


def check(
    module: nn.Module, inputs: Tensor, layers: list[str] | None = None, precision: torch.dtype | None = None
) -> None:
    capture = GradientCapture(module, layers, precision)
    check_capture(capture, lambda: capture.run(lambda network: network(inputs), len(inputs)))


IN_FLOAT32 = [name for name in CASES if "weight" not in name]  # weighted bags take float64
LOWERED = ["linear", "conv", "group norm", "encoder", "tied weights", "embedding"]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, torch.float64) for name in CASES),
        *((name, torch.float32) for name in IN_FLOAT32),
        *((name, torch.bfloat16) for name in LOWERED),
    ],
)
def test_layers_that_are_captured_rightly_pass(name: str, precision: torch.dtype) -> None:
    module, inputs = prepared(name)
    if precision != torch.float64:
        module, inputs = module.float(), inputs.float() if inputs.is_floating_point() else inputs
    module.requires_grad_(False)
    check(module, inputs[:3], precision=precision if precision == torch.bfloat16 else None)
    assert not any(parameter.requires_grad for parameter in module.parameters())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False).tanh())


class HalfFrozen(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.first(x)
        return self.second(hidden)


class Dropped(Checkpointed):
    """Draws noise in its forward pass, as none is drawn twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.first(x), 0.5))


@pytest.mark.parametrize(
    "module", [Checkpointed(), HalfFrozen(), Dropped(), SharedPositions()], ids=lambda m: type(m).__name__
)
def test_awkward_models_pass(module: nn.Module) -> None:
    torch.manual_seed(0)
    check(module, torch.randn(3, 6, 4) if isinstance(module, SharedPositions) else torch.randn(3, 4))


class Lookup(nn.Module):
    """Uses its embedding as the weight of its output too, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(11, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(self.embed(tokens)).tanh(), self.embed.weight)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.embed = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.hidden(x)).tanh() @ self.embed.weight


class OwnPositions(nn.Module):
    """Has its positions where a batch would be."""

    def __init__(self, find: Callable[[nn.Embedding], Tensor]) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(3, 4), nn.Linear(4, 2)
        self.find = find

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden((x + self.find(self.embed)).tanh())


class Hyper(nn.Module):
    """Makes its weights from a constant, which is spread over the batch and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden((x * self.embed(torch.ones(1, 3)).mean(0)).tanh())


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(self.embed(x.flip(0)).flip(0))


TOKENS, VECTORS, SEQUENCES = torch.randint(0, 11, (3, 5)), torch.randn(3, 4), torch.randn(3, 3, 4)
WRONG: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "a weight used by hand": (Lookup, TOKENS, "used outside"),
    "a weight used turned around": (Autoencoder, VECTORS, "used outside"),
    "as many positions as examples": (lambda: OwnPositions(lambda e: e(torch.arange(3))), SEQUENCES, "not the examples"),
    "positions of a batch of one": (lambda: OwnPositions(lambda e: e(torch.arange(3)[None])[0]), SEQUENCES, "not the examples"),
    "weights made from a constant": (Hyper, VECTORS, "not the examples"),
    "a batch turned around": (Turned, VECTORS, "not the examples"),
}  # fmt: skip


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_layers_that_are_captured_wrongly_are_named(name: str, frozen: bool) -> None:
    torch.manual_seed(0)
    make, inputs, reason = WRONG[name]
    module = make().requires_grad_(not frozen)
    with pytest.raises(UnsupportedLayerError, match=f"embed.*{reason}|{reason}.*embed|embed.*{reason}"):
        check(module, inputs)
    check(module, inputs, ["!embed"])
    assert all(parameter.requires_grad != frozen for parameter in module.parameters())
