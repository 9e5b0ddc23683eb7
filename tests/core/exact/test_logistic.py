"""Leave-one-out and groups of logistic regression against refits to the optimum, in float64."""

import numpy as np
import pytest
import torch

from attribution_core.errors import InvalidInputError, SingularCurvatureError
from attribution_core.exact import LogisticRegression, Regulariser, measured_changes, measurement_gradients, newton
from attribution_core.exact.losses import CrossEntropy
from attribution_core.exact.newton import minimise
from tests.core.exact.data import classes, correlation, digits, relative_error, slope

REGULARISERS: list[Regulariser] = ["fixed", "per_example"]
L2 = 0.02
# Two classes with one logit, two with a softmax, three with a softmax.
WIDTHS = [(2, 1), (2, 2), (3, 3)]


def model_of(count: int, width: int, regulariser: Regulariser = "fixed") -> LogisticRegression:
    features, targets = classes(count=count)
    return LogisticRegression.fit(features, targets, L2 * len(features), num_outputs=width, regulariser=regulariser)


def rest_of(model: LogisticRegression, rows: list[int] | np.ndarray) -> tuple[np.ndarray, float]:
    rest = np.setdiff1d(np.arange(len(model.features)), rows)
    shrunk = model.penalty * len(rest) / len(model.features)
    return rest, shrunk if model.regulariser == "per_example" else model.penalty


def without(model: LogisticRegression, rows: list[int] | np.ndarray) -> np.ndarray:
    """θ* - θ_{-F} by refitting from 0, (P,)."""
    rest, penalty = rest_of(model, rows)
    start = np.zeros_like(model.parameters)
    refitted = minimise(model.loss, model.features[rest], model.targets[rest], penalty, start)
    return (model.parameters - refitted).ravel()


def objective_gradient(model: LogisticRegression, theta: np.ndarray, penalty: float, rows: np.ndarray) -> torch.Tensor:
    """The gradient by autodiff of torch's own losses."""
    parameters = torch.tensor(theta.reshape(model.parameters.shape), requires_grad=True)
    logits = torch.from_numpy(model.features[rows]) @ parameters.T
    targets = torch.from_numpy(model.targets[rows])
    if logits.shape[1] == 1:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], targets.double(), reduction="sum")
    else:
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return torch.autograd.grad(loss + penalty / 2 * parameters.square().sum(), parameters)[0]


@pytest.mark.parametrize(("count", "width"), WIDTHS)
def test_fits_and_refits_are_optima(count: int, width: int) -> None:
    model = model_of(count, width, "per_example")
    everything = np.arange(len(model.features))
    assert objective_gradient(model, model.parameters, model.penalty, everything).norm() < 1e-10
    rows = np.arange(0, 80, 3)
    rest, penalty = rest_of(model, rows)
    assert objective_gradient(model, model.refitted(rows), penalty, rest).norm() < 1e-10
    assert objective_gradient(model, model.refitted(rows), model.penalty, rest).norm() > 1e-3


@pytest.mark.parametrize(("count", "width"), WIDTHS)
@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_one_newton_step_without_an_example_is_solved_exactly(count: int, width: int, regulariser: Regulariser) -> None:
    """Against the dense Hessian and gradient of what is left, by autodiff."""
    model = model_of(count, width, regulariser)
    found = model.parameter_changes(np.arange(6))
    for row in range(6):
        np.testing.assert_allclose(found[row], dense_step(model, [row]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [2, 5, 16, 40])
@pytest.mark.parametrize(("count", "width"), WIDTHS)
@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_one_newton_step_without_a_group_is_solved_exactly(
    size: int, count: int, width: int, regulariser: Regulariser
) -> None:
    model = model_of(count, width, regulariser)
    rows = np.random.default_rng(size).choice(80, size, replace=False)
    np.testing.assert_allclose(model.group_change(rows), dense_step(model, rows), rtol=0, atol=1e-10)


def dense_step(model: LogisticRegression, rows: list[int] | np.ndarray) -> np.ndarray:
    rest, penalty = rest_of(model, rows)
    logits = torch.from_numpy(model.features[rest])
    targets = torch.from_numpy(model.targets[rest])

    def objective(flat: torch.Tensor) -> torch.Tensor:
        outputs = logits @ flat.reshape(model.parameters.shape).T
        if outputs.shape[1] == 1:
            outputs = torch.cat([torch.zeros_like(outputs), outputs], 1)
        loss = torch.nn.functional.cross_entropy(outputs, targets, reduction="sum")
        return loss + penalty / 2 * flat.square().sum()

    theta = torch.from_numpy(model.parameters.ravel()).requires_grad_()
    gradient = torch.autograd.grad(objective(theta), theta)[0]
    curvature = torch.autograd.functional.hessian(objective, theta)
    # θ_{-F} = θ - H⁻¹∇, so what having the group did is H⁻¹∇.
    return torch.linalg.solve(curvature, gradient).detach().numpy()


@pytest.mark.parametrize(("count", "width"), WIDTHS)
@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_full_newton_for_groups_equals_refitting(count: int, width: int, regulariser: Regulariser) -> None:
    model = model_of(count, width, regulariser)
    for size in (1, 10, 40):
        rows = np.random.default_rng(size).choice(80, size, replace=False)
        np.testing.assert_allclose(model.group_change(rows, "newton"), without(model, rows), rtol=0, atol=1e-8)
    singles = np.stack([without(model, [row]) for row in range(3)])
    np.testing.assert_allclose(model.parameter_changes(np.arange(3), "newton"), singles, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("count", "width"), WIDTHS)
@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_leave_one_out_margins_agree_with_refits(count: int, width: int, regulariser: Regulariser) -> None:
    model = model_of(count, width, regulariser)
    asked, wanted = classes(6, count=count, seed=7)
    rows = np.arange(len(model.features))
    exact = measured_changes(model, asked, wanted, "margin", rows, "newton")
    found = measured_changes(model, asked, wanted, "margin", rows)
    assert correlation(found, exact) > 0.999
    assert relative_error(found, exact) < 0.1
    assert 0.97 < slope(found, exact) < 1.03
    # Without the leverage effects come out too small, and the sign decides everything.
    influence = measured_changes(model, asked, wanted, "margin", rows, "influence")
    assert slope(influence, exact) < 0.93
    assert relative_error(influence, exact) > 0.1
    assert correlation(-found, exact) < -0.99


def test_leave_one_out_of_digits_agrees_with_refits() -> None:
    """Ten classes: one Newton step with the 10 × 10 leverage of each example, and influence without it as the control."""
    features, targets, asked, wanted = digits()
    model = LogisticRegression.fit(features, targets, 0.25, num_outputs=10, regulariser="per_example")
    rows = np.random.default_rng(0).choice(len(features), 40, replace=False)
    exact, found, influence = (
        measured_changes(model, asked, wanted, "margin", rows, estimator)
        for estimator in ("newton", "alo", "influence")
    )
    assert correlation(found, exact) > 0.999
    assert relative_error(found, exact) < 0.1
    assert 0.97 < slope(found, exact) < 1.03
    assert relative_error(influence, exact) > 0.1
    first_order = model.scores(measurement_gradients(model, asked, wanted, "margin"))[:, rows]
    assert correlation(first_order, exact) > 0.99


def test_groups_of_digits_agree_with_refits() -> None:
    features, targets, asked, wanted = digits(300)
    model = LogisticRegression.fit(features, targets, 3.0, num_outputs=10)
    groups = [np.random.default_rng(seed).choice(300, 30, replace=False) for seed in range(8)]
    groups += [np.flatnonzero(targets == label)[:20] for label in range(4)]
    exact, found, influence = (
        measured_changes(model, asked, wanted, "margin", groups, estimator)
        for estimator in ("newton", "alo", "influence")
    )
    assert correlation(found, exact) > 0.99
    assert relative_error(found, exact) < relative_error(influence, exact) / 2


@pytest.mark.parametrize(("count", "width"), WIDTHS)
@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_the_infinitesimal_jackknife_is_the_derivative_by_a_weight(
    count: int, width: int, regulariser: Regulariser
) -> None:
    model = model_of(count, width, regulariser)
    found, epsilon = model.parameter_changes(np.arange(5), "influence"), 1e-3
    for row in range(5):
        refits = []
        for sign in (1, -1):
            weights = np.ones(80)
            weights[row] += sign * epsilon
            penalty = model.penalty * weights.mean() if regulariser == "per_example" else model.penalty
            problem = (model.loss, model.features, model.targets, penalty, model.parameters)
            refits.append(minimise(*problem, weights=weights).ravel())
        np.testing.assert_allclose(found[row], (refits[0] - refits[1]) / (2 * epsilon), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("regulariser", REGULARISERS)
@pytest.mark.parametrize("estimator", ["alo", "influence"])
def test_scores_are_inner_products_with_parameter_changes(regulariser: Regulariser, estimator: str) -> None:
    model = model_of(3, 3, regulariser)
    gradients = np.random.default_rng(1).normal(size=(5, model.num_parameters))
    changes = model.parameter_changes(np.arange(80), estimator)  # type: ignore[arg-type]
    scores = model.scores(gradients, estimator)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores, gradients @ changes.T, rtol=0, atol=1e-12)


def test_the_penalty_leaving_with_examples_matters() -> None:
    fixed, shared = model_of(3, 3, "fixed"), model_of(3, 3, "per_example")
    rows = np.arange(40)
    assert relative_error(fixed.group_change(rows, "newton"), without(shared, rows)) > 0.05
    assert relative_error(fixed.group_change(rows), shared.group_change(rows)) > 0.05


def test_a_softmax_without_penalty_needs_the_pseudo_inverse() -> None:
    """Then it says of margins what two refits of the two-class model with one logit say."""
    features, targets = classes(count=2)
    single = LogisticRegression.fit(features, targets, 0.0, num_outputs=1)
    double = LogisticRegression.fit(features, targets, 0.0, num_outputs=2, pseudo_inverse=True)
    refused = LogisticRegression(features, targets, double.parameters, 0.0)
    with pytest.raises(SingularCurvatureError, match="5 of 10 directions"):
        refused.parameter_changes(np.arange(3))
    rows, asked = np.arange(80), classes(4, count=2, seed=3)
    for estimator in ("influence", "alo"):
        changes = [measured_changes(model, *asked, "margin", rows, estimator) for model in (single, double)]  # type: ignore[arg-type]
        np.testing.assert_allclose(changes[0], changes[1], rtol=0, atol=1e-8)


def test_separable_classes_without_penalty_have_no_optimum() -> None:
    features = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    with pytest.raises(InvalidInputError, match="separable"):
        LogisticRegression.fit(features, np.array([0, 0, 1, 1]), 0.0, num_outputs=1)
    LogisticRegression.fit(features, np.array([0, 0, 1, 1]), 1e-3, num_outputs=1)


def test_newton_reaches_the_optimum_from_far_away() -> None:
    """Full steps diverge from here; shortened ones do not."""
    features, targets = classes()
    near = minimise(CrossEntropy(), features, targets, 0.1, np.zeros((3, 5)))
    far = minimise(CrossEntropy(), features, targets, 0.1, 30 * np.random.default_rng(0).normal(size=(3, 5)))
    np.testing.assert_allclose(near, far, rtol=0, atol=1e-8)


@pytest.mark.parametrize("targets", [np.zeros(80), np.full(80, 3), np.full(80, -1), np.zeros((80, 1), int)])
def test_targets_that_are_no_classes_are_refused(targets: np.ndarray) -> None:
    features, _ = classes()
    with pytest.raises(InvalidInputError, match=r"integer target|classes 0 … 2"):
        LogisticRegression(features, targets, np.zeros((3, 5)), 1.0)


@pytest.mark.parametrize(("count", "width"), WIDTHS)
@pytest.mark.parametrize("penalty", [1e-3, 5.0])
def test_optima_of_many_parameters_are_found_without_forming_their_curvature(
    count: int, width: int, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(count, width)
    weights = np.random.default_rng(2).uniform(0.5, 2, len(model.features))
    problem = (model.loss, model.features, model.targets, penalty, np.zeros_like(model.parameters))
    formed = minimise(*problem, weights=weights)
    monkeypatch.setattr(newton, "FORMED", 0)
    monkeypatch.setattr(newton, "hessian", lambda *_: pytest.fail("formed"))
    found = minimise(*problem, weights=weights)
    assert relative_error(found, formed) < 1e-7
    assert np.abs(found - formed).max() < 1e-7
    again = minimise(*problem[:-1], found, weights=weights)
    assert np.abs(again - found).max() < 1e-9, "an optimum stays"
