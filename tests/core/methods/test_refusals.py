"""Fits that cannot work say why, and those that can do: examples at fault, dead layers, nothing left to train on."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attribution_core.architectures.build import build
from attribution_core.errors import InvalidInputError, SingularCurvatureError, UnsupportedLayerError
from attribution_core.methods import context
from tests.core.methods import problems
from tests.core.methods.problems import MLP, SMALL, N, Problem

BAD = 37
CURVATURES: list[dict[str, Any]] = [
    {"type": "ekfac"},
    {"type": "kfac", "perturbation": {"copies": 1, "training": {}}},
    {"type": "kfac"},
    {"type": "diagonal"},
    {"type": "gauss_newton"},
    {"type": "explicit"},
    {"type": "arnoldi"},
    {"type": "datainf"},
    {"type": "lissa"},
    {"type": "cg"},
    {"type": "source", "segments": 1},
]


@pytest.fixture(scope="module", params=[1e30, 3e38])
def overflowing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """A problem with an example whose gradient is not finite, or has no finite square."""
    given = problems.classification(tmp_path_factory.mktemp("good"))
    inputs, folder = given.inputs.clone(), tmp_path_factory.mktemp("bad")
    inputs[BAD] = request.param
    return problems.problem(folder, inputs, given.targets, MLP, modules=[m.float() for m in given.modules()])


@pytest.mark.parametrize("layout", ["vectors", "factors"])
@pytest.mark.parametrize("method", CURVATURES, ids=lambda method: method["type"])
def test_the_training_example_without_finite_gradient_is_named(
    overflowing: Problem, method: dict[str, Any], layout: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"no finite gradient for training example {BAD}$"):
        overflowing.fit("bad", method={"projection": SMALL, **method}, store={"layout": layout})


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """A problem whose network's second hidden layer is never active, so that only its last bias has a gradient."""
    given = problems.classification(tmp_path_factory.mktemp("alive"))
    architecture = MLP.model_copy(update={"arguments": {**MLP.arguments, "hidden": [6, 6], "activation": "relu"}})
    torch.manual_seed(0)
    module = build(architecture)
    with torch.no_grad():
        [layer for layer in module.modules() if isinstance(layer, nn.Linear)][1].bias.fill_(-100.0)
    return problems.problem(
        tmp_path_factory.mktemp("dead"), given.inputs, given.targets, architecture, modules=[module]
    )


@pytest.mark.parametrize("layers", [None, ["hidden_0"]], ids=["all", "dead"])
@pytest.mark.parametrize(
    "method",
    [
        {"type": "ekfac"},
        {"type": "kfac"},
        {"type": "gauss_newton"},
        {"type": "datainf"},
        {"type": "logra", "projection": {"type": "factored", "dim": 64}},
        {"type": "trak"},
        {"type": "trak", "curvature": "fisher"},
    ],
    ids=lambda method: "-".join(value for value in method.values() if isinstance(value, str)),
)
def test_dead_layers_have_no_share_of_scores(dead: Problem, method: dict[str, Any], layers: list[str] | None) -> None:
    index = dead.fit("dead", method={"projection": SMALL, "damping": 0.1, **method}, layers=layers)
    query, rows = index.query(dead.queries(), None), np.arange(N)
    scores = index.scores(query, rows, rescore=True)
    assert bool(scores.any()) == (layers is None)
    assert np.isfinite(scores).all()
    if method["type"] != "datainf":  # has no such estimator
        assert bool(index.newton_effects(query, [rows[:5]]).any()) == (layers is None)
    with pytest.raises(SingularCurvatureError):
        index.query(dead.queries(), 0.0)


@pytest.mark.parametrize("left_out", [[3, 1], [N], list(range(N))])
def test_impossible_rows_are_not_left_out_of_a_fit(dead: Problem, left_out: list[int]) -> None:
    with pytest.raises(ValueError, match=r"left_out|left out"):
        dead.with_(left_out=left_out)


class Autoencoder(nn.Module):
    """Uses the weight of its first layer by hand too."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = nn.Linear(5, 6), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x).tanh() @ self.encode.weight)


@pytest.mark.parametrize("method", ["grad_dot", "ekfac", "trak"])
def test_layers_whose_gradients_cannot_be_captured_are_named(
    dead: Problem, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "load_model", lambda *_: Autoencoder().requires_grad_(False))
    asked = {"type": method, "projection": SMALL}
    with pytest.raises(UnsupportedLayerError, match=r"encode .* leave it out of `layers`"):
        dead.fit("named", method=asked)
    index = dead.fit("without", method=asked, layers=["!encode"])
    assert index.context.checkpoint(0).capture.coverage.skipped[0]["name"] == "encode"
