from itertools import pairwise

import numpy as np
import pytest

from attribution_core.bank_methods import posterior
from attribution_core.bank_methods.contrasts import Contrasts
from attribution_core.bank_methods.design import random_subsets, widest_subsets
from attribution_core.bank_methods.effect_prior import EffectPrior
from attribution_core.bank_methods.posterior import condition, fit_posterior, learn
from attribution_core.bank_methods.variance_components import Problem, at, maximise
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.lds import correlations
from attribution_core.evaluate.retrainings import Retrainings


def world(n=80, queries=15, subsets=400, seeds=1, noise=1.5, seed=0):
    """Effects of a few strong examples per query, and scores that know them roughly."""
    generator = np.random.default_rng(seed)
    size = generator.exponential(size=(queries, n)) ** 2
    scores = size * generator.choice([-1, 1], (queries, n))
    effects = scores + np.sqrt(size) * generator.normal(size=(queries, n))
    masks = random_subsets(n, 0.5, subsets, seed)
    values = (masks @ effects.T)[:, None] + noise * generator.normal(size=(subsets, seeds, queries))
    return effects, scores, Retrainings(masks, values)


def dense(prior: EffectPrior, query: int) -> np.ndarray:
    return np.diag(prior.own[query]) + prior.directions.T @ np.diag(prior.shared[query]) @ prior.directions


@pytest.mark.parametrize("seeds", [1, 3])
def test_posterior_equals_gaussian_conditioning_by_brute_force(seeds):
    _, scores, bank = world(n=7, queries=4, subsets=9, seeds=seeds)
    values = bank.values.copy()
    if seeds > 1:
        values[2, 1] = np.nan  # unequal numbers of seeds
    bank = Retrainings(bank.masks, values)
    found = fit_posterior([scores, scores**2], bank, run_factors=0)
    masks = bank.masks.astype(float)
    probe = np.random.default_rng(1).normal(size=(3, 7))
    for query in range(4):
        # The joint Gaussian of effects, a vague intercept and outputs, with nothing eliminated by hand.
        vague = 1e5
        joint = np.zeros((8, 8))
        joint[:7, :7] = dense(found.prior, query)
        joint[7, 7] = vague
        design = np.hstack([masks, np.ones((9, 1))])
        noise = np.diag(found.noise[query] / bank.counts)
        gain = joint @ design.T @ np.linalg.inv(design @ joint @ design.T + noise)
        mean = np.append(found.prior_mean[query], 0.0)
        mean = mean + gain @ (bank.means[:, query] - design @ mean)
        covariance = joint - gain @ design @ joint
        assert found.scores[query] == pytest.approx(mean[:7], rel=1e-4, abs=1e-5)
        covered = found.covariance(probe, probe)[query]
        assert covered == pytest.approx(probe @ covariance[:7, :7] @ probe.T, rel=1e-4, abs=1e-5)
        level, variance = found.outputs(bank.masks[:3])
        assert level[query] == pytest.approx(design[:3] @ mean, rel=1e-4, abs=1e-4)
        assert variance[query] == pytest.approx(np.diag(design[:3] @ covariance @ design[:3].T), rel=1e-3, abs=1e-4)
        change, width = found.changes(bank.masks[:3])
        left_out = (1 - masks)[:3]
        assert change[query] == pytest.approx(-left_out @ mean[:7], rel=1e-4, abs=1e-4)
        assert width[query] == pytest.approx(np.diag(left_out @ covariance[:7, :7] @ left_out.T), rel=1e-4, abs=1e-4)


def test_posterior_with_noise_common_to_queries_is_still_gaussian_conditioning():
    _, scores, bank = world(n=7, queries=6, subsets=9)
    found = fit_posterior([scores], bank, run_factors=2)
    x, targets = found.contrasts.design, found.contrasts.targets
    for query in range(6):
        prior, total = dense(found.prior, query), np.linalg.inv(found.inverses[query])
        noise = total - x @ prior @ x.T
        assert np.linalg.eigvalsh(noise).min() > 0
        assert np.trace(noise) / len(noise) == pytest.approx(found.noise[query])
        gain = prior @ x.T @ np.linalg.inv(x @ prior @ x.T + noise)
        mean = found.prior_mean[query] + gain @ (targets[query] - x @ found.prior_mean[query])
        assert found.scores[query] == pytest.approx(mean, rel=1e-8, abs=1e-10)


def test_posterior_beats_its_prior_and_grows_with_retrainings():
    effects, scores, bank = world()
    held = bank.of(np.arange(200, 400))
    held = Retrainings(held.masks, (held.masks @ effects.T)[:, None])
    reached = [correlations(scores, held).mean()]
    reached += [
        correlations(fit_posterior([scores], bank.of(np.arange(m))).scores, held).mean() for m in (10, 25, 50, 200)
    ]
    assert all(later > before for before, later in pairwise(reached))


def test_a_useless_prior_gets_no_weight_beside_a_good_one_and_scale_does_not_matter():
    _, scores, bank = world()
    bank = bank.of(np.arange(50))
    noise = np.random.default_rng(7).normal(size=scores.shape)
    found = fit_posterior([scores, noise], bank)
    assert found.hyperparameters.weights[0] == pytest.approx(1, abs=0.15)
    assert abs(found.hyperparameters.weights[1]) < 0.2
    scaled = fit_posterior([1e6 * scores, -1e-6 * noise], bank)
    assert scaled.scores == pytest.approx(found.scores, rel=1e-3, abs=1e-3)


def test_noise_is_found_with_and_without_seeds():
    _, scores, bank = world(subsets=100, seeds=3)
    many = fit_posterior([scores], bank)
    one = fit_posterior([scores], bank.single_seed(np.random.default_rng(0)))
    assert np.median(many.noise) == pytest.approx(1.5**2, rel=0.5)
    assert 1.5**2 / 2 < np.median(one.noise) < 3 * 1.5**2  # with one seed, what the prior misses looks like noise
    assert many.hyperparameters.run is None
    assert one.hyperparameters.run is not None


def test_posterior_intervals_hold_the_true_effects_of_groups():
    effects, scores, bank = world()
    found = fit_posterior([scores], bank.of(np.arange(50)))
    masks = random_subsets(80, 0.8, 200, seed=4)
    mean, variance = found.changes(masks)
    true = -effects @ (~masks).T
    inside = np.abs(true - mean) <= 1.645 * np.sqrt(variance)
    assert inside.mean() == pytest.approx(0.9, abs=0.07)


@pytest.mark.parametrize("seeds", [1, 2])
def test_queries_are_conditioned_by_what_a_pool_taught_whatever_is_beside_them(seeds):
    """A query of the pool gets the pool's own fit; others are better than their prior, and the same alone."""
    effects, scores, bank = world(seeds=seeds)
    bank, held = bank.of(np.arange(40)), bank.of(np.arange(200, 400))
    pool, asked = slice(0, 10), slice(10, 15)

    def of(part):
        return [scores[part]], Retrainings(bank.masks, bank.values[:, :, part])

    learned, whole = learn(*of(pool)), fit_posterior(*of(pool))
    again = condition(learned, *of(slice(3, 12)))
    probe = np.random.default_rng(3).normal(size=(4, 80))
    assert again.scores[:7] == pytest.approx(whole.scores[3:], rel=1e-9, abs=1e-9)
    assert again.variances(probe)[:7] == pytest.approx(whole.variances(probe)[3:], rel=1e-9)
    found = condition(learned, *of(asked))
    alone = condition(learned, *of(slice(11, 12)))
    assert found.scores[1:2] == pytest.approx(alone.scores, rel=1e-9, abs=1e-9)
    assert found.variances(probe)[1:2] == pytest.approx(alone.variances(probe), rel=1e-9)
    assert found.of(slice(1, 2)).variances(probe) == pytest.approx(alone.variances(probe), rel=1e-9)
    truth = Retrainings(held.masks, (held.masks @ effects[asked].T)[:, None])
    assert correlations(found.scores, truth).mean() > correlations(scores[asked], truth).mean()
    with pytest.raises(InvalidInputError, match="some of the retrainings"):
        values = bank.values[:, :, asked].copy()
        values[5] = np.inf
        condition(learned, [scores[asked]], Retrainings(bank.masks, values))


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_part_of_a_large_bank_teaches_what_all_of_it_does_and_all_of_it_is_conditioned_on(monkeypatch, seeds):
    _, scores, bank = world(queries=30, subsets=200, seeds=seeds)
    values = bank.values.copy()
    values[7], values[11, 0, 3] = (
        np.nan,
        np.inf,
    )  # one subset without a retraining, and one retraining whose loss shows in one query only
    bank = Retrainings(bank.masks, values)
    whole = fit_posterior([scores], bank)
    monkeypatch.setattr(posterior, "LEARNED_SUBSETS", 80)
    monkeypatch.setattr(posterior, "LEARNED_VALUES", 800)
    part = fit_posterior([scores], bank)
    assert part.hyperparameters != whole.hyperparameters
    assert part.hyperparameters.weights == pytest.approx(whole.hyperparameters.weights, rel=0.1)
    assert np.median(part.noise / whole.noise) == pytest.approx(1, abs=0.25)
    assert part.inverses.shape == whole.inverses.shape
    assert np.corrcoef(part.scores.ravel(), whole.scores.ravel())[0, 1] > 0.995


def test_diverged_retrainings_do_not_matter():
    _, scores, bank = world()
    values = bank.values[:30].copy()
    values[4] = np.nan
    with_it = fit_posterior([scores], Retrainings(bank.masks[:30], values))
    without = fit_posterior([scores], bank.of(np.delete(np.arange(30), 4)))
    assert with_it.scores == pytest.approx(without.scores)
    assert with_it.hyperparameters.trainings == 29


def test_bad_input_is_refused():
    _, scores, bank = world(subsets=10)
    for methods in ([], [scores[:, 1:]], [scores * np.nan]):
        with pytest.raises(InvalidInputError):
            fit_posterior(methods, bank)
    with pytest.raises(InvalidInputError, match="three"):
        fit_posterior([scores], bank.of(np.arange(2)))
    with pytest.raises(InvalidInputError, match="nothing to condition"):
        fit_posterior([scores], Retrainings(bank.masks, np.ones_like(bank.values)))


def test_marginal_likelihood_is_climbed_to_a_flat_top_at_the_planted_variances():
    generator = np.random.default_rng(0)
    root = generator.normal(size=(20, 5))
    shapes = [np.broadcast_to(np.eye(20), (300, 20, 20)), np.broadcast_to(root @ root.T, (300, 20, 20))]
    regressors = generator.normal(size=(300, 20, 1))
    targets = (
        2 * regressors[:, :, 0] + 0.5 * generator.normal(size=(300, 20)) + generator.normal(size=(300, 5)) @ root.T
    )
    problem = Problem(shapes, targets, regressors, np.zeros(300))
    found = maximise(np.array([5.0, 0.1]), problem)
    assert found.variances == pytest.approx([0.25, 1.0], rel=0.1)
    assert found.weights == pytest.approx([2.0], abs=0.05)
    for place in range(2):
        for factor in (0.9, 1.1):
            moved = found.variances.copy()
            moved[place] *= factor
            assert at(moved, problem).log_likelihood < found.log_likelihood


def test_contrasts_ignore_the_intercept_and_have_equal_noise():
    _, _, bank = world(subsets=6, seeds=2)
    moved = Retrainings(bank.masks, bank.values + 100)
    assert Contrasts.of(moved).targets == pytest.approx(Contrasts.of(bank).targets)
    noise = np.random.default_rng(0).normal(size=(6, 2, 20000))
    noise[3, 0] = np.nan
    spread = Contrasts.of(Retrainings(bank.masks, noise)).targets
    assert np.cov(spread.T) == pytest.approx(np.eye(5), abs=0.05)


def test_design_picks_the_widest_first_and_what_it_learned_changes_the_next_pick():
    _, scores, bank = world(subsets=20)
    found = fit_posterior([scores], bank)
    candidates = random_subsets(80, 0.5, 30, seed=8)
    candidates[1] = candidates[0]
    chosen = widest_subsets(found, candidates, 5)
    width = found.variances(candidates - found.contrasts.center) / found.noise[:, None]
    assert chosen[0] == width.mean(0).argmax()
    assert len(set(chosen.tolist())) == 5
    assert not {0, 1} <= set(chosen.tolist())
    with pytest.raises(InvalidInputError):
        widest_subsets(found, candidates, 31)
