"""Sign and scale of scores against real retraining: exact refits of a convex model without each example, in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attribution_core.architectures.build import build
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.spec import ArchitectureSpec
from tests.core.methods.problems import Problem, problem, relative_error

N, DIM, L2 = 200, 5, 0.02
LARGE = {"type": "gaussian", "dim": 64, "seed": 0}


def refitted(inputs: Tensor, targets: Tensor, classes: int, l2: float, start: Tensor | None = None) -> Tensor:
    """Minimise mean cross-entropy + l2/2 ‖θ‖² by Newton's method: (classes, d + 1), the bias last.

    Args:
        inputs: (n, d); only the rows that are trained on.
        l2: divided by nothing: the caller rescales it when examples leave.
    """
    a = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    theta = torch.zeros(classes, a.shape[1], dtype=torch.float64) if start is None else start.clone()
    onehot = torch.nn.functional.one_hot(targets, classes).double()
    for _ in range(30):
        p = (a @ theta.T).softmax(1)
        gradient = ((p - onehot).T @ a / len(a) + l2 * theta).flatten()
        weight = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)  # (n, classes, classes)
        hessian = torch.einsum("ncd,ni,nj->cidj", weight, a, a).reshape(theta.numel(), -1) / len(a)
        # Without a penalty the softmax has a direction that changes nothing; the pseudo-inverse leaves it alone.
        step = (
            torch.linalg.pinv(hessian + l2 * torch.eye(theta.numel(), dtype=torch.float64), hermitian=True) @ gradient
        )
        theta = theta - step.reshape(theta.shape)
        if step.abs().max() < 1e-12:
            return theta
    raise AssertionError("the refit did not converge")


def margins(theta: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = inputs @ theta[:, :-1].T + theta[:, -1]
    mine = logits.gather(1, targets[:, None])[:, 0]
    return mine - logits.scatter(1, targets[:, None], -torch.inf).logsumexp(1)


def convex(folder: Path, classes: int, l2: float) -> tuple[Problem, Tensor]:
    """A logistic regression at its optimum, and the exact leave-one-out effects (queries, N)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(N, DIM, generator=generator).double()
    rule = torch.randn(DIM, classes, generator=generator).double()
    noise = torch.randn(N, classes, generator=generator).double()
    targets = (inputs @ rule + 1.5 * noise).argmax(1)
    theta = refitted(inputs, targets, classes, l2)
    architecture = ArchitectureSpec(name="logistic", arguments={"input_dim": DIM, "num_classes": classes})
    module = build(architecture)
    layer = next(part for part in module.modules() if isinstance(part, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(theta[:, :-1])
        layer.bias.copy_(theta[:, -1])
    given = problem(folder, inputs, targets, architecture, modules=[module])
    queries = given.queries(6)
    arguments = (queries.inputs.double(), queries.targets % classes)
    base = margins(theta, *arguments)
    effects = []
    for row in range(N):
        rest = torch.arange(N) != row
        # The penalty belongs to the sum over examples, so it weighs more on the mean of fewer.
        without = refitted(inputs[rest], targets[rest], classes, l2 * N / (N - 1), theta)
        effects.append(base - margins(without, *arguments))
    return given, torch.stack(effects, dim=1)


def agreement(found: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Correlation, and the slope of the prediction on the truth (1 is calibrated)."""
    x, y = exact.ravel(), found.ravel().astype(np.float64)
    return float(np.corrcoef(x, y)[0, 1]), float(x @ y / (x @ x))


def scores(index: LoadedIndex, given: Problem, classes: int, damping: float) -> np.ndarray:
    batch = given.queries(6)
    batch = batch.__class__(batch.rows, batch.inputs, batch.targets % classes)
    return index.scores(index.query(batch, damping), np.arange(N), rescore=True)


@pytest.fixture(scope="module", params=[2, 3], ids=["binary", "three classes"])
def penalised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Problem, np.ndarray, int]:
    given, exact = convex(tmp_path_factory.mktemp("penalised"), request.param, L2)
    return given, exact.numpy(), request.param


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, np.ndarray]:
    given, exact = convex(tmp_path_factory.mktemp("binary"), 2, 0.0)
    return given, exact.numpy()


@pytest.mark.parametrize(("limit", "least", "slopes"), [(0, 0.94, (0.8, 1.0)), (1280, 0.999, (0.92, 0.98))])
def test_ekfac_predicts_exact_refits(
    penalised: tuple[Problem, np.ndarray, int], limit: int, least: float, slopes: tuple[float, float]
) -> None:
    """With λ equal to the penalty of the training objective; the rest is the Kronecker factors' error, if the layer has such."""
    given, exact, classes = penalised
    index = given.fit("ekfac", method={"type": "ekfac", "projection": LARGE, "whole_layers": limit})
    mean = float(index.members[0].curvature.eigenvalues[0].mean())  # type: ignore[attr-defined]
    correlation, slope = agreement(scores(index, given, classes, L2 / mean), exact)
    assert correlation > least
    assert slopes[0] < slope < slopes[1]  # a leave-one-out effect is larger than its linearisation by the leverage
    over_damped = agreement(scores(index, given, classes, 100.0), exact)
    assert over_damped[1] < 0.1


@pytest.mark.parametrize(
    ("method", "damping"),
    [
        ({"type": "explicit", "curvature": "hessian", "l2": L2}, 0.0),
        ({"type": "explicit", "curvature": "gauss_newton", "l2": L2}, 0.0),
        ({"type": "arnoldi", "l2": L2, "iterations": 18, "rank": 18}, 0.0),
    ],
    ids=lambda value: "-".join(str(part) for part in value.values()) if isinstance(value, dict) else "",
)
def test_the_penalised_hessian_predicts_exact_refits(
    penalised: tuple[Problem, np.ndarray, int], method: dict, damping: float
) -> None:
    """Nothing is approximated but the leverage, so every solver gives the same slope, the same on every row."""
    given, exact, classes = penalised
    index = given.fit("hessian", method={"projection": LARGE, **method})
    correlation, slope = agreement(scores(index, given, classes, damping), exact)
    assert correlation > 0.99
    assert 0.86 < slope < 0.95


def test_groups_are_predicted_with_sign_and_scale(penalised: tuple[Problem, np.ndarray, int]) -> None:
    given, _, classes = penalised
    index = given.fit("ekfac", method={"type": "ekfac", "projection": LARGE})
    mean = float(index.members[0].curvature.eigenvalues[0].mean())  # type: ignore[attr-defined]
    batch = given.queries(6)
    batch = batch.__class__(batch.rows, batch.inputs, batch.targets % classes)
    groups = [np.random.default_rng(seed).choice(N, 20, replace=False) for seed in range(12)]
    predicted = index.group_effects(index.query(batch, L2 / mean), groups, rescore=True)
    full = refitted(given.inputs, given.targets, classes, L2)
    realised = []
    for rows in groups:
        rest = np.setdiff1d(np.arange(N), rows)
        theta = refitted(given.inputs[rest], given.targets[rest], classes, L2 * N / len(rest), full)
        before, after = (margins(t, batch.inputs.double(), batch.targets) for t in (full, theta))
        realised.append((before - after).numpy())
    correlation, slope = agreement(predicted, np.stack(realised, axis=1))
    assert correlation > 0.99
    assert 0.85 < slope < 1.0


def test_trak_of_a_binary_logistic_regression_is_the_newton_step(binary: tuple[Problem, np.ndarray]) -> None:
    """Two classes and enough dimensions: the weighted kernel is the Hessian, so only the leverage is missing."""
    given, exact = binary
    index = given.fit("trak", method={"type": "trak", "projection": LARGE, "damping": 1e-6})
    found = scores(index, given, 2, 1e-6)
    correlation, slope = agreement(found, exact)
    assert correlation > 0.998
    assert 0.88 < slope < 0.95
    newton, leverage = newton_step(given)
    assert relative_error(found, newton) < 1e-5
    assert relative_error(index.self_influence(), leverage) < 1e-5


def newton_step(given: Problem) -> tuple[Tensor, Tensor]:
    """`x_zᵀ H⁻¹ x_i (1 - p_i)` with signed inputs and `H = Σ p(1-p) x xᵀ`, (queries, N); and the same of each row with itself."""
    theta = refitted(given.inputs, given.targets, 2, 0.0)
    queries = given.queries(6)

    def signed(inputs: Tensor, targets: Tensor) -> Tensor:
        ones = torch.ones(len(inputs), 1, dtype=torch.float64)
        return torch.cat([inputs.double(), ones], 1) * (2.0 * (targets % 2) - 1).unsqueeze(1)

    train, asked = signed(given.inputs, given.targets), signed(queries.inputs, queries.targets)
    p = torch.sigmoid(train @ (theta[1] - theta[0]))
    inverse = torch.linalg.inv((train * (p * (1 - p)).unsqueeze(1)).T @ train)
    return asked @ inverse @ train.T * (1 - p), ((train @ inverse) * train).sum(1) * (1 - p)


def test_the_published_kernel_has_another_scale(binary: tuple[Problem, np.ndarray]) -> None:
    given, exact = binary
    index = given.fit("published", method={"type": "trak", "projection": LARGE, "curvature": "gradient"})
    correlation, slope = agreement(scores(index, given, 2, 1e-6), exact)
    assert correlation > 0.8
    assert 0 < slope < 0.2
