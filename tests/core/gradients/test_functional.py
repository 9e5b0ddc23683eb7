"""What the rule for any module refuses, because it could not be right."""

import pytest
import torch
from torch import Tensor, nn

from attribution_core.errors import UnsupportedLayerError
from attribution_core.gradients import GradientCapture


class Odd(nn.Module):
    """A module without a rule that does what it is told."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, extra: object = None) -> object:
        match self.kind:
            case "mixes":
                return self.weight * (x - x.mean(0))
            case "random":
                return self.weight * nn.functional.dropout(x, 0.5)
            case "branches":
                return self.weight * x if bool(x.sum() > 0) else self.weight - x
            case "pair":
                return self.weight * x, x
            case _:
                return self.weight * x


class Around(nn.Module):
    def __init__(self, kind: str, extra: object = None) -> None:
        super().__init__()
        self.odd, self.extra = Odd(kind), extra

    def forward(self, x: Tensor) -> Tensor:
        found = self.odd(x, self.extra)
        return found[0] if isinstance(found, tuple) else found


def gradient_of(module: nn.Module) -> Tensor:
    torch.manual_seed(0)
    run = GradientCapture(module).run(lambda network: network(torch.randn(4, 3)), 4)
    return run.gradients(run.output.sum(1))[0].materialise()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Around("mixes"), "another output alone than in its batch"),
        (Around("random"), "randomness"),
        (Around("branches"), "cannot be run one example at a time"),
        (Around("pair"), "returns a tuple"),
        (Around("plain", {"scale": 2}), "takes a dict"),
    ],
)
def test_what_cannot_be_right_is_refused(module: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=f"Odd .*{reason}.*leave it out"):
        gradient_of(module)


def test_what_all_examples_share_is_not_divided() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 3)
    assert torch.equal(gradient_of(Around("plain", torch.randn(2, 2))).flatten(1), inputs)


def test_a_layer_of_too_many_parameters_is_left_out() -> None:
    module = nn.Sequential(nn.Linear(2, 2), Odd("plain"))
    module[1].weight = nn.Parameter(torch.empty(1 << 25, device="meta"))
    (skipped,) = GradientCapture(module).coverage.skipped
    assert "too many" in skipped["reason"]


def test_a_first_dimension_that_is_not_the_batch_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    with pytest.raises(UnsupportedLayerError, match="first dimension must be the batch"):
        GradientCapture(Flat()).run(lambda network: network(torch.randn(4, 5, 3)), 4)
