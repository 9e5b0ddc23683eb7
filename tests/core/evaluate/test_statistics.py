import json

import numpy as np
import pytest

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.lds import bootstrap_both, ceiling, correlations, linear_datamodeling_score
from attribution_core.evaluate.loo import leave_one_out
from attribution_core.evaluate.mislabel import auc, mislabel_auc, plant_flips
from attribution_core.evaluate.mixture import mixture_check
from attribution_core.evaluate.ranks import ranks, spearman
from attribution_core.evaluate.removal import (
    random_ranking,
    ranking_of,
    removal_curve,
    removal_masks,
    removal_result,
)
from attribution_core.evaluate.retrainings import Retrainings


def planted(noise=0.0, subsets=60, seeds=3, queries=12, n=40, seed=0):
    generator = np.random.default_rng(seed)
    effects = generator.normal(size=(queries, n))
    masks = np.zeros((subsets, n), bool)
    for mask in masks:
        mask[generator.permutation(n)[: n // 2]] = True
    values = (masks @ effects.T)[:, None] + noise * generator.normal(size=(subsets, seeds, queries))
    return effects, Retrainings(masks, values)


def test_ranks_share_ties():
    assert ranks(np.array([[3.0, 1.0, 3.0, 2.0, 3.0]])).tolist() == [[3.0, 0.0, 3.0, 1.0, 3.0]]


def test_spearman_of_ties_equals_its_definition_and_a_constant_orders_nothing():
    first, second = np.array([[1.0, 1.0, 2.0, 3.0]]), np.array([[4.0, 2.0, 2.0, 9.0]])
    expected = np.corrcoef([0.5, 0.5, 2, 3], [2, 0.5, 0.5, 3])[0, 1]
    assert spearman(first, second)[0] == pytest.approx(expected)
    assert spearman(first, np.ones((1, 4)))[0] == 0


def test_lds_of_an_oracle_is_one_and_of_permuted_scores_zero_within_its_interval():
    effects, bank = planted()
    result = linear_datamodeling_score(2 * effects + 0.0, bank)
    assert result.lds == pytest.approx(1)
    assert result.low == pytest.approx(1)
    assert result.high == pytest.approx(1)
    assert result.slope == pytest.approx(2)
    assert result.ceiling == pytest.approx(1)
    assert result.control_low < 0 < result.control_high
    assert abs(result.control) < 0.05
    shuffled = linear_datamodeling_score(effects[:, ::-1], bank)
    assert shuffled.low < 0 < shuffled.high


def test_interval_over_subsets_and_queries_covers_the_lds_of_many_subsets():
    effects, _ = planted()
    guess = effects + np.random.default_rng(5).normal(size=effects.shape)
    masks = planted(subsets=2000, seed=9)[1].masks
    truth = spearman(guess @ masks.T, effects @ masks.T).mean()
    inside = 0
    for repeat in range(40):
        drawn = np.random.default_rng(repeat).choice(2000, 40, replace=False)
        found = bootstrap_both(guess @ masks[drawn].T, effects @ masks[drawn].T, 200, np.random.default_rng(repeat))
        low, high = np.quantile(found, [0.025, 0.975])
        inside += low <= truth <= high
    assert inside >= 34


def test_ceiling_is_what_a_perfect_predictor_of_expectations_reaches():
    effects, bank = planted(noise=6.0, subsets=400, seeds=4)
    assert ceiling(bank) == pytest.approx(correlations(effects, bank).mean(), abs=0.03)
    assert ceiling(Retrainings(bank.masks, bank.values[:, :1])) is None


def test_diverged_retrainings_are_left_out_and_counted():
    effects, bank = planted(noise=0.5)
    values = bank.values.copy()
    values[0, 1, 3] = np.nan
    values[7] = np.inf
    result = linear_datamodeling_score(effects, Retrainings(bank.masks, values))
    assert result.diverged == 4
    assert result.subsets == 59
    expected = np.delete(bank.values, 7, axis=0).mean(1)
    expected[0] = bank.values[0, [0, 2]].mean(0)
    assert result.lds == pytest.approx(spearman(effects @ np.delete(bank.masks, 7, axis=0).T, expected.T).mean())
    with pytest.raises(InvalidInputError, match="did not diverge"):
        linear_datamodeling_score(effects, Retrainings(bank.masks, np.full_like(values, np.nan)))


def test_results_are_deterministic_and_become_json_with_their_protocol():
    effects, bank = planted(noise=1.0)
    first, second = (linear_datamodeling_score(effects, bank, seed=3) for _ in range(2))
    assert first == second
    told = json.loads(json.dumps(first.as_json()))
    assert told["seed"] == 3
    assert told["resampling"].startswith("queries and subsets")
    assert told["removed_share"] == [0.5, 0.5]


def test_leave_one_out_recovers_slope_and_refuses_other_masks():
    effects, _ = planted()
    n = effects.shape[1]
    masks = ~np.eye(n, dtype=bool)
    full = effects.sum(1) + 3
    bank = Retrainings(masks, (masks @ effects.T + 3)[:, None])
    result = leave_one_out(0.5 * effects, bank, full)
    assert result.correlation == pytest.approx(1)
    assert result.rank_correlation == pytest.approx(1)
    assert result.slope == pytest.approx(0.5)
    masks[0, 5] = False
    with pytest.raises(InvalidInputError, match="exactly one"):
        leave_one_out(effects, Retrainings(masks, bank.values), full)


def test_removal_curve_of_true_effects_is_their_sum_and_beats_random():
    effects, _ = planted()
    sizes, full = [2, 5, 10], effects.sum(1)
    values = {}
    for name, ranking in {"method": ranking_of(effects), "random": random_ranking(*effects.shape, seed=1)}.items():
        masks = removal_masks(ranking, sizes)
        assert (~masks).sum(2).tolist() == [sizes] * len(effects)
        values[name] = np.einsum("qsn,qn->qs", masks, effects)[:, :, None]
    result = removal_result(sizes, values, full, "method")
    largest = -np.sort(-effects, axis=1)
    expected = [largest[:, :size].sum(1).mean() for size in sizes]
    assert result.curves["method"].drop == pytest.approx(expected)
    heights = [0, *expected]
    area = sum((b + a) / 2 * w for a, b, w in zip(heights, heights[1:], [2, 3, 5], strict=False)) / 10
    assert result.curves["method"].area == pytest.approx(area)
    assert result.advantage["random"] > 0
    json.dumps(result.as_json())


def test_removal_curve_leaves_out_diverged_retrainings():
    values = np.array([[[1.0, np.nan]], [[np.nan, np.nan]], [[3.0, 5.0]]])
    curve = removal_curve([4], values, np.array([2.0, 9.0, 5.0]))
    assert curve.drop == pytest.approx([1.0])
    assert curve.diverged == 3
    with pytest.raises(InvalidInputError, match="must rise"):
        removal_masks(np.tile(np.arange(4), (2, 1)), [3, 2])


def test_auc_equals_counting_pairs_with_ties():
    generator = np.random.default_rng(0)
    scores, positive = generator.integers(0, 5, 60).astype(float), generator.random(60) < 0.3
    pairs = scores[positive][:, None] - scores[~positive][None]
    assert auc(scores, positive) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_planted_flips_are_found_by_scores_that_know_them_and_not_by_others():
    labels = np.random.default_rng(0).integers(0, 10, 300)
    moved, flipped = plant_flips(labels, 10, 0.1, seed=2)
    assert flipped.sum() == 30
    assert (moved != labels).tolist() == flipped.tolist()
    assert mislabel_auc(flipped + 0.0, flipped).auc == 1
    blind = mislabel_auc(np.random.default_rng(1).normal(size=300), flipped)
    assert blind.low < 0.5 < blind.high


def test_mixture_check_passes_for_separate_sources_and_fails_for_blind_scores():
    generator = np.random.default_rng(0)
    train, queries = np.repeat(["a", "b"], [150, 50]), np.repeat(["a", "b"], 15)
    noise = generator.normal(size=(30, 200))
    good = mixture_check(noise + 3 * (train[None] == queries[:, None]), train, queries)
    assert good.passed
    assert good.own_share > 0.9
    assert good.base_rate == pytest.approx(0.5)
    blind = mixture_check(noise, train, queries)
    assert not blind.passed
    assert blind.own_share == pytest.approx(0.5, abs=0.1)
    # Scores that all queries share must not pass for many independent observations.
    shared = [mixture_check(np.tile(row, (30, 1)), train, np.repeat("a", 30)).passed for row in noise]
    assert sum(shared) <= 2
