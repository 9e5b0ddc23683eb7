"""The method `exact` through fit and index, against refits of the same models without each example."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attribution_core.architectures.build import build
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.methods import linear_head
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.spec import ArchitectureSpec
from tests.core.methods.problems import Problem, problem, relative_error
from tests.core.methods.test_fit import hashes, run
from tests.core.methods.test_retraining import L2, N, agreement, convex

EXACT: dict[str, Any] = {"type": "exact", "l2": L2, "regulariser": "fixed"}


def scores(index: LoadedIndex, batch: Batch) -> np.ndarray:
    return index.scores(index.query(batch, None), np.arange(N), rescore=True)


def queries_of(given: Problem, classes: int) -> Batch:
    batch = given.queries(6)
    return Batch(batch.rows, batch.inputs, batch.targets % classes)


@pytest.fixture(scope="module", params=[2, 3], ids=["binary", "three classes"])
def logistic(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Problem, np.ndarray, Batch]:
    given, exact = convex(tmp_path_factory.mktemp("exact"), request.param, L2)
    return given, exact.numpy(), queries_of(given, request.param)


@pytest.mark.parametrize("estimator", ["alo", "newton"])
def test_scores_of_a_logistic_regression_are_those_of_refits(
    logistic: tuple[Problem, np.ndarray, Batch], estimator: str
) -> None:
    given, exact, batch = logistic
    found = scores(given.fit("exact", method={**EXACT, "estimator": estimator}), batch)
    correlation, slope = agreement(found, exact)
    assert correlation > 0.999
    assert 0.98 < slope < 1.02
    assert relative_error(found, exact) < 0.05


def test_influence_lacks_the_leverage(logistic: tuple[Problem, np.ndarray, Batch]) -> None:
    given, exact, batch = logistic
    correlation, slope = agreement(scores(given.fit("i", method={**EXACT, "estimator": "influence"}), batch), exact)
    assert correlation > 0.99
    assert slope < 0.95


def test_another_l2_than_the_model_was_trained_with_is_refused(logistic: tuple[Problem, np.ndarray, Batch]) -> None:
    given, _, _ = logistic
    with pytest.raises(InvalidInputError, match="not at the optimum"):
        given.fit("wrong", method={**EXACT, "l2": 2 * L2})
    given.fit("assumed", method={**EXACT, "l2": 2 * L2, "optimum": "assume"})


@pytest.mark.parametrize("changes", [{"optimum": "polish"}, {"optimum": "assume", "estimator": "newton"}])
def test_weights_near_the_optimum_are_polished(
    logistic: tuple[Problem, np.ndarray, Batch], tmp_path: Path, changes: dict[str, str]
) -> None:
    given, exact, batch = logistic
    (module,) = given.modules()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[0].add_(0.1)
    moved = problem(tmp_path, given.inputs, given.targets, given.spec.architecture, modules=[module])
    with pytest.raises(InvalidInputError, match="not at the optimum"):
        moved.fit("moved", method=EXACT)
    found = scores(moved.fit("polished", method={**EXACT, **changes}), batch)
    assert agreement(found, exact)[0] > 0.99


def test_an_unpenalised_softmax_leaves_what_no_data_decide(tmp_path: Path) -> None:
    """Two classes have a margin that is linear in the parameters, so refits are predicted to rounding."""
    given, exact = convex(tmp_path, 2, 0.0)
    batch = queries_of(given, 2)
    refits = scores(given.fit("free", method={"type": "exact", "estimator": "newton"}), batch)
    assert relative_error(refits, exact.numpy()) < 1e-4
    correlation, slope = agreement(scores(given.fit("step", method={"type": "exact"}), batch), exact.numpy())
    assert correlation > 0.998
    assert 0.94 < slope < 1


def ridge_problem(folder: Path, outputs: int, bias: bool) -> tuple[Problem, Tensor, Tensor]:
    """A ridge regression at its optimum, its features and its targets."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(N, 5, generator=generator).double()
    targets = inputs @ torch.randn(5, outputs, generator=generator).double() + torch.randn(
        N, outputs, generator=generator
    )
    targets = targets.float().double()
    features = torch.cat([inputs, torch.ones(N, 1)], 1) if bias else inputs
    theta = refitted(features, targets, L2)
    architecture = ArchitectureSpec(name="linear", arguments={"input_dim": 5, "output_dim": outputs, "bias": bias})
    module = build(architecture)
    layer = next(part for part in module.modules() if isinstance(part, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(theta[:, :5])
        if bias:
            layer.bias.copy_(theta[:, 5])
    stored = targets[:, 0] if outputs == 1 else targets
    given = problem(
        folder, inputs, stored.float(), architecture, task="regression", modules=[module], measurement="prediction"
    )
    return given, features, targets


def refitted(features: Tensor, targets: Tensor, l2: float) -> Tensor:
    """The minimiser (outputs, d) of the mean of `½‖θx - y‖²` plus l2/2 ‖θ‖²."""
    gram = features.T @ features / len(features) + l2 * torch.eye(features.shape[1])
    return torch.linalg.solve(gram, features.T @ targets / len(features)).T


@pytest.mark.parametrize(("outputs", "bias"), [(1, True), (1, False), (3, True)])
def test_scores_of_a_ridge_regression_are_refits(tmp_path: Path, outputs: int, bias: bool) -> None:
    """With the same l2 on the mean loss of what is left."""
    given, features, targets = ridge_problem(tmp_path, outputs, bias)
    index = given.fit("ridge", method={"type": "exact", "l2": L2})
    asked = given.queries(4)
    batch = Batch(asked.rows, asked.inputs, torch.zeros(4, outputs))
    found = scores(index, batch)
    inputs = asked.inputs.double()
    inputs = torch.cat([inputs, torch.ones(4, 1)], 1) if bias else inputs
    theta = refitted(features, targets, L2)
    exact = np.empty((4, N))
    own = np.empty(N)
    for row in range(N):
        rest = torch.arange(N) != row
        change = theta - refitted(features[rest], targets[rest], L2)
        exact[:, row] = (inputs @ change.T).mean(1)
        own[row] = (features[row] @ change.T).mean()
    assert relative_error(found, exact) < 1e-5
    assert relative_error(index.self_influence(), own) < 1e-5
    assert index.dim == theta.numel()
    fixed = scores(given.fit("fixed", method={"type": "exact", "l2": L2, "regulariser": "fixed"}), batch)
    assert relative_error(fixed, exact) > 1e-4


def test_same_bytes_in_any_order(tmp_path: Path) -> None:
    given, _, _ = ridge_problem(tmp_path, 2, True)
    spec = given.with_(method={"type": "exact", "l2": L2})
    assert run(spec, tmp_path / "work", tmp_path / "one") == run(spec, tmp_path / "w2", tmp_path / "two", seed=5)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_deeper_models_are_refused(problem: Problem) -> None:
    with pytest.raises(InvalidInputError, match="one linear layer"):
        problem.fit("deep", method={"type": "exact"})


def test_a_curvature_too_large_to_decompose_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For squared errors it has one row per feature whatever the number of outputs; for a softmax one per parameter."""
    monkeypatch.setattr(linear_head, "MAX_CURVATURE", 6)
    ridge_problem(tmp_path / "ridge", 3, True)[0].fit("small", method={"type": "exact", "l2": L2})
    with pytest.raises(InvalidInputError, match="12 rows"):
        convex(tmp_path / "logistic", 2, L2)[0].fit("large", method=EXACT)
