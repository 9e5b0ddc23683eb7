from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from attribution_core.bank_methods.posterior import fit_posterior
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.calibration import (
    AffineCalibration,
    IsotonicCalibration,
    calibrate,
    fit_affine,
    fit_isotonic,
    trusted,
)
from attribution_core.evaluate.conformal import coverage, fit_intervals, least_subsets, squared_scores_removed
from attribution_core.evaluate.retrainings import Retrainings
from benchmarks.lds import Truth
from tests.core.evaluate.test_statistics import planted

TRUTH = Path(__file__).parents[3] / "benchmarks/truth"
CLASSIFICATION = ["fashion-cnn", "fashion-mlp", "letter-logistic", "mnist-cnn", "mnist-mlp"]


def test_affine_calibration_recovers_a_line():
    predicted = np.random.default_rng(0).normal(size=(5, 20))
    found = fit_affine(predicted, 0.3 + 2 * predicted)
    assert (found.intercept, found.slope) == pytest.approx((0.3, 2))


def test_isotonic_calibration_meets_its_optimality_conditions():
    generator = np.random.default_rng(0)
    predicted = generator.integers(0, 30, (4, 25)).astype(float)
    realised = predicted**2 / 30 + 4 * generator.normal(size=predicted.shape)
    fitted = fit_isotonic(predicted, realised).apply(predicted)
    places = np.unique(predicted)
    heights = np.array([fitted[predicted == place][0] for place in places])
    assert (np.diff(heights) >= -1e-12).all()
    # Projection on the monotone cone: residuals are orthogonal to the fit and have no positive product with any step.
    residuals = realised - fitted
    assert (residuals * fitted).sum() == pytest.approx(0, abs=1e-8)
    assert all(residuals[predicted >= place].sum() <= 1e-8 for place in places)


def test_isotonic_is_chosen_where_the_truth_bends_and_affine_with_few_subsets():
    predicted = np.random.default_rng(0).normal(size=(20, 60))
    assert isinstance(calibrate(predicted, np.tanh(4 * predicted)), IsotonicCalibration)
    assert isinstance(calibrate(predicted[:, :20], np.tanh(4 * predicted[:, :20])), AffineCalibration)
    noisy = predicted + np.random.default_rng(1).normal(size=predicted.shape)
    assert isinstance(calibrate(predicted, noisy), AffineCalibration)


@pytest.mark.parametrize(
    ("removed", "protocols", "calibrated"),
    [
        (500, [(0.5, 0.5)], True),
        (499, [(0.5, 0.5)], False),
        (10, [(0.5, 0.5)], False),
        (10, [(0.5, 0.5), (0.01, 0.05)], True),
        (5, [(0.5, 0.5), (0.01, 0.05)], False),
        (500, [], False),
    ],
)
def test_only_measured_shares_are_calibrated(removed, protocols, calibrated):
    found = trusted(removed, 1000, protocols)
    assert found.calibrated is calibrated
    assert ("lies in" in found.reason) is calibrated


def test_intervals_cover_and_shrink_with_the_removed_effects():
    _, bank = planted(noise=1.0, subsets=400, queries=20)
    effects, _ = planted(queries=20)
    generator = np.random.default_rng(3)
    guess = effects + 0.7 * generator.normal(size=effects.shape)
    predicted = bank.means.T.mean(1, keepdims=True) + guess @ (bank.masks - 0.5).T
    spread = squared_scores_removed(guess, bank.masks)
    parts = np.split(generator.permutation(400), [50, 250])
    fit = fit_intervals(predicted, spread, bank, parts[0], parts[1])
    assert coverage(fit, predicted, spread, bank, parts[2]) == pytest.approx(0.9, abs=0.04)
    one, many = np.zeros((1, 40), bool), np.ones((1, 40), bool)
    many[0, :2] = False
    widths = [float(fit.scale(squared_scores_removed(guess, masks)).mean()) for masks in (one, many, ~one)]
    assert all(wide > narrow for wide, narrow in pairwise(widths))
    assert widths[2] == pytest.approx(float(np.sqrt(fit.noise).mean()))


def test_single_seeds_need_wider_intervals_than_means():
    effects, bank = planted(noise=3.0, subsets=200)
    predicted = effects @ bank.masks.T
    spread = squared_scores_removed(effects, bank.masks)
    halves = np.split(np.arange(200), [50, 150])
    fits = [
        fit_intervals(predicted, spread, bank, halves[0], halves[1], realised=kind) for kind in ("mean", "single_seed")
    ]
    widths = [fit.quantile * fit.scale(spread).mean() for fit in fits]
    assert widths[1] == pytest.approx(np.sqrt(3) * widths[0], rel=0.1)
    for fit in fits:
        assert coverage(fit, predicted, spread, bank, halves[2]) == pytest.approx(0.9, abs=0.04)


def test_too_few_calibration_subsets_and_overlaps_are_refused():
    effects, bank = planted()
    predicted, spread = effects @ bank.masks.T, squared_scores_removed(effects, bank.masks)
    assert least_subsets(0.9) == 9
    with pytest.raises(InvalidInputError, match="at least 9"):
        fit_intervals(predicted, spread, bank, np.arange(10), np.arange(10, 18))
    with pytest.raises(InvalidInputError, match="both"):
        fit_intervals(predicted, spread, bank, np.arange(10), np.arange(9, 30))


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize("realised", ["mean", "single_seed"])
def test_stated_ninety_per_cent_covers_held_out_retrainings(name, realised):
    """Real retrainings; the prior is the empirical influence of the first half's first seed, so that no scores have to be stored."""
    truth = Truth.read(TRUTH / f"{name}.npz")
    subsets, shares = len(truth.masks), []
    for split in range(4):
        order = np.random.default_rng(split).permutation(subsets)
        conditioned, fitting, calibrating, held = np.split(order, np.array([2, 3, 8]) * subsets // 10)
        bank = truth.of(conditioned).single_seed(np.random.default_rng(split))
        posterior = fit_posterior([datamodel(bank)], bank)
        mean, variance = posterior.outputs(truth.masks)
        fit = fit_intervals(mean, variance, truth, fitting, calibrating, realised=realised)
        shares.append(coverage(fit, mean, variance, truth, held))
    assert 0.85 <= np.mean(shares) <= 0.95


def datamodel(bank: Retrainings) -> np.ndarray:
    centred = bank.masks - bank.masks.mean(0)
    return (centred.T @ (bank.means - bank.means.mean(0))).T / len(centred)
