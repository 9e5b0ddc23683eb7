"""Telling optima from parameters that are not."""

import subprocess
import sys

import numpy as np
import pytest

from attribution_core.exact import GeneralizedLinear, LogisticRegression, RidgeRegression, optimality
from tests.core.exact.data import classes, regression


def models() -> list[GeneralizedLinear]:
    features, targets = classes()
    return [RidgeRegression.fit(*regression(), 1.0), LogisticRegression.fit(features, targets, 1.6, num_outputs=3)]


@pytest.mark.parametrize("model", models(), ids=["linear", "logistic"])
def test_an_optimum_is_told_from_its_surroundings(model: GeneralizedLinear) -> None:
    here = optimality(model)
    assert here.reached
    assert here.relative_gradient < 1e-10
    moved = model.parameters + 0.1 * np.random.default_rng(0).normal(size=model.parameters.shape)
    away = optimality(model.at(moved))
    assert not away.reached
    assert away.gradient_norm > 1


@pytest.mark.parametrize("model", models(), ids=["linear", "logistic"])
def test_polishing_leads_back_to_the_optimum(model: GeneralizedLinear) -> None:
    polished = model.at(model.parameters + 0.1).polished()
    np.testing.assert_allclose(polished.parameters, model.parameters, atol=1e-9)
    assert optimality(polished).reached


def test_half_the_squared_decrement_of_a_quadratic_is_what_it_is_above_its_minimum() -> None:
    model = RidgeRegression.fit(*regression(), 1.0)

    def objective(theta: np.ndarray) -> float:
        return float(((model.features @ theta.T - model.targets) ** 2).sum() / 2 + (theta**2).sum() / 2)

    moved = model.parameters + 0.1
    decrement = optimality(model.at(moved)).newton_decrement
    assert decrement**2 / 2 == pytest.approx(objective(moved) - objective(model.parameters), rel=1e-9)


def test_the_distance_is_counted_in_influences_of_examples() -> None:
    """Leaving a typical example out moves the parameters about as far as one of its own influences."""
    model = RidgeRegression.fit(*regression(200), 1.0)
    changes = model.parameter_changes(np.arange(200), "influence")
    moved = [optimality(model.at(model.parameters - change.reshape(1, -1))).in_examples for change in changes]
    assert np.sqrt(np.mean(np.square(moved))) == pytest.approx(1, rel=0.05)


def test_importing_the_mathematics_needs_no_torch() -> None:
    code = "import sys, attribution_core.exact; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
