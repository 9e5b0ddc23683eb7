"""Closed forms of ridge regression against refitting, in float64."""

import numpy as np
import pytest

from attribution_core.errors import InvalidInputError, SingularCurvatureError
from attribution_core.exact import Regulariser, RidgeRegression, measured_changes, measurement_gradients
from attribution_core.exact.linear import ridge
from tests.core.exact.data import digits, regression, relative_error, slope

REGULARISERS: list[Regulariser] = ["fixed", "per_example"]


def refitted(features: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """The normal equations, solved plainly."""
    gram = features.T @ features + penalty * np.eye(features.shape[1])
    return np.linalg.solve(gram, features.T @ targets).T


def without(model: RidgeRegression, rows: list[int] | np.ndarray) -> np.ndarray:
    """What leaving rows out does by refitting: θ* - θ_{-F}, (P,)."""
    rest = np.setdiff1d(np.arange(len(model.features)), rows)
    shrunk = model.penalty * len(rest) / len(model.features)
    penalty = shrunk if model.regulariser == "per_example" else model.penalty
    full = refitted(model.features, model.targets, model.penalty)
    return (full - refitted(model.features[rest], model.targets[rest], penalty)).ravel()


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("regulariser", REGULARISERS)
@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_leaving_out_any_one_example_equals_refitting(outputs: int, regulariser: Regulariser, penalty: float) -> None:
    model = RidgeRegression.fit(*regression(outputs=outputs), penalty, regulariser=regulariser)
    found = model.parameter_changes(np.arange(len(model.features)))
    exact = np.stack([without(model, [row]) for row in range(len(model.features))])
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-8)
    np.testing.assert_allclose(model.parameter_changes(np.arange(5), "newton"), exact[:5], rtol=0, atol=1e-8)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("regulariser", REGULARISERS)
@pytest.mark.parametrize("size", [1, 4, 7, 8, 30])
def test_leaving_out_a_group_equals_refitting(outputs: int, regulariser: Regulariser, size: int) -> None:
    """Sizes on both sides of the number of features, up to half of the examples."""
    model = RidgeRegression.fit(*regression(outputs=outputs), 0.7, regulariser=regulariser)
    for seed in range(5):
        rows = np.random.default_rng(seed).choice(len(model.features), size, replace=False)
        np.testing.assert_allclose(model.group_change(rows), without(model, rows), rtol=0, atol=1e-8)
        np.testing.assert_allclose(model.group_change(rows, "newton"), without(model, rows), rtol=0, atol=1e-8)


def test_real_data_leave_one_out_equals_refitting() -> None:
    features, labels, asked, _ = digits(200)
    targets = np.eye(10)[labels]
    model = RidgeRegression.fit(features, targets, 1.0)
    found = model.parameter_changes(np.arange(200))
    exact = np.stack([without(model, [row]) for row in range(200)])
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-8)
    changes = measured_changes(model, asked, np.zeros((len(asked), 10)), "prediction", np.arange(200))
    exact_changes = np.einsum("jcd,qd->qj", exact.reshape(200, 10, -1), asked) / 10
    np.testing.assert_allclose(changes, exact_changes, rtol=0, atol=1e-8)


def test_a_wrong_sign_or_a_missing_leverage_is_far_outside_the_tolerance() -> None:
    model = RidgeRegression.fit(*regression(), 0.0)
    rows = np.arange(len(model.features))
    exact = np.stack([without(model, [row]) for row in rows])
    assert relative_error(-model.parameter_changes(rows), exact) > 1
    assert relative_error(model.parameter_changes(rows, "influence"), exact) > 0.05


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_the_regimes_of_the_penalty_differ(regulariser: Regulariser) -> None:
    features, targets = regression()
    model = RidgeRegression.fit(features, targets, 20.0, regulariser=regulariser)
    other = RidgeRegression.fit(features, targets, 20.0, regulariser=next(r for r in REGULARISERS if r != regulariser))
    assert relative_error(other.group_change(np.arange(20)), without(model, np.arange(20))) > 0.01


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_the_infinitesimal_jackknife_is_the_derivative_by_a_weight(regulariser: Regulariser) -> None:
    features, targets = regression(outputs=2)
    penalty, epsilon = 3.0, 1e-4
    model = RidgeRegression.fit(features, targets, penalty, regulariser=regulariser)
    found = model.parameter_changes(np.arange(10), "influence")
    for row in range(10):
        refits = []
        for sign in (1, -1):
            weights = np.ones(len(features))
            weights[row] += sign * epsilon
            shared = penalty * weights.mean() if regulariser == "per_example" else penalty
            refits.append(ridge(features, targets, shared, weights=weights).ravel())
        np.testing.assert_allclose(found[row], (refits[0] - refits[1]) / (2 * epsilon), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("regulariser", REGULARISERS)
@pytest.mark.parametrize("estimator", ["alo", "influence"])
def test_scores_are_inner_products_with_parameter_changes(regulariser: Regulariser, estimator: str) -> None:
    model = RidgeRegression.fit(*regression(outputs=3), 4.0, regulariser=regulariser)
    gradients = np.random.default_rng(1).normal(size=(5, model.num_parameters))
    changes = model.parameter_changes(np.arange(len(model.features)), estimator)  # type: ignore[arg-type]
    scores = model.scores(gradients, estimator)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores, gradients @ changes.T, rtol=0, atol=1e-12)


def test_predictions_change_as_refits_say_and_losses_do_beyond_first_order() -> None:
    features, targets = regression()
    model = RidgeRegression.fit(features, targets, 1.0)
    asked, wanted = regression(8, seed=5)
    rows = np.arange(len(features))
    exact = np.empty((8, len(rows)))
    for row in rows:
        after = model.parameters - without(model, [int(row)]).reshape(model.parameters.shape)
        before = -((asked @ model.parameters.T - wanted) ** 2).sum(1)
        exact[:, row] = before + ((asked @ after.T - wanted) ** 2).sum(1)
    evaluated = measured_changes(model, asked, wanted, "negative_squared_error", rows)
    np.testing.assert_allclose(evaluated, exact, rtol=0, atol=1e-8)
    gradients = measurement_gradients(model, asked, wanted, "negative_squared_error")
    first_order = model.scores(gradients)
    assert 1e-4 < relative_error(first_order, exact) < 0.1
    assert 0.95 < slope(first_order, exact) < 1.05


def test_the_hat_matrix_turns_targets_into_predictions() -> None:
    model = RidgeRegression.fit(*regression(outputs=2), 1.3)
    np.testing.assert_allclose(model.hat() @ model.targets, model.outputs, rtol=0, atol=1e-10)
    leverages = model.leverages(np.arange(60), model.penalty)
    np.testing.assert_allclose(leverages[:, 0, 0], np.diag(model.hat()), rtol=0, atol=1e-12)


def test_collinear_features_are_refused_or_left_alone() -> None:
    features, targets = regression()
    doubled = np.concatenate([features, features[:, :1]], axis=1)
    with pytest.raises(SingularCurvatureError, match="1 of 8 directions"):
        RidgeRegression.fit(doubled, targets, 0.0)
    model = RidgeRegression.fit(doubled, targets, 0.0, pseudo_inverse=True)
    single = RidgeRegression.fit(features, targets, 0.0)
    rows = np.arange(len(features))
    changes = [
        measured_changes(each, asked, targets[:4], "prediction", rows)
        for each, asked in ((model, doubled[:4]), (single, features[:4]))
    ]
    np.testing.assert_allclose(changes[0], changes[1], rtol=0, atol=1e-8)


def test_an_example_that_alone_decides_a_parameter_is_refused() -> None:
    features, targets = regression()
    alone = np.concatenate([features, np.eye(len(features))[:, :1]], axis=1)
    model = RidgeRegression.fit(alone, targets, 0.0)
    with pytest.raises(SingularCurvatureError, match="leverage 1"):
        model.parameter_changes(np.arange(3))
    with pytest.raises(SingularCurvatureError, match="leverage 1"):
        model.group_change(np.arange(20))
    assert np.isfinite(model.parameter_changes(np.arange(1, 3))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": np.zeros((60, 2))}, "targets are"),
        ({"parameters": np.zeros((1, 3))}, "not one per feature"),
        ({"penalty": -1.0}, "penalty"),
        ({"features": np.full((60, 7), np.nan)}, "finite"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    features, targets = regression()
    given = {"features": features, "targets": targets, "parameters": np.zeros((1, 7)), "penalty": 0.0, **change}
    with pytest.raises(InvalidInputError, match=message):
        RidgeRegression(**given)  # type: ignore[arg-type]
