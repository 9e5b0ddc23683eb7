from itertools import combinations
from math import comb

import numpy as np
import pytest

from attribution_core.bank_methods.ame import average_marginal_effects
from attribution_core.bank_methods.banzhaf import data_banzhaf
from attribution_core.bank_methods.datamodels import lasso, lasso_datamodel, ridge_datamodel, violations
from attribution_core.bank_methods.empirical_influence import empirical_influence
from attribution_core.bank_methods.knn_shapley import knn_shapley
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.retrainings import Retrainings


def sparse_truth(subsets=300, n=40, queries=6, shares=(0.5,), seed=0):
    generator = np.random.default_rng(seed)
    effects = np.where(generator.random((queries, n)) < 0.15, generator.normal(size=(queries, n)) * 2, 0)
    masks = generator.random((subsets, n)) < generator.choice(shares, subsets)[:, None]
    values = masks @ effects.T + 5 + 0.1 * generator.normal(size=(subsets, queries))
    return effects, Retrainings(masks, values[:, None])


def all_subsets(n, utility):
    masks = np.array([[bool(number >> i & 1) for i in range(n)] for number in range(2**n)])
    return Retrainings(masks, np.array([utility(mask) for mask in masks])[:, None])


def test_datamodels_recover_a_planted_linear_truth():
    effects, bank = sparse_truth(queries=3)
    found = lasso_datamodel(bank, path=6)
    assert found.scores == pytest.approx(effects, abs=0.15)
    assert (np.abs(found.scores[effects == 0]) < 0.06).all()
    assert found.predict(bank.masks) == pytest.approx(bank.means.T, abs=0.8)
    assert ridge_datamodel(bank).scores == pytest.approx(effects, abs=0.15)


def test_lasso_meets_its_optimality_conditions_and_vanishes_at_the_largest_penalty():
    _, bank = sparse_truth(subsets=30)
    design, targets = bank.masks - bank.masks.mean(0), (bank.means - bank.means.mean(0)).T
    largest = np.abs(targets @ design / 30).max(1)
    weights = lasso(design, targets, 0.1 * largest, tolerance=1e-6, max_steps=20_000)
    assert (violations(design, targets, weights, 0.1 * largest) <= 1e-6 * largest).all()
    assert (weights != 0).any(1).all()
    assert not lasso(design, targets, 1.0001 * largest).any()


def test_every_query_is_fitted_as_if_it_were_alone():
    _, bank = sparse_truth(subsets=60)
    together = lasso_datamodel(bank)
    alone = lasso_datamodel(Retrainings(bank.masks, bank.values[:, :, 2:3]))
    assert together.penalties[2] == pytest.approx(alone.penalties[0])
    assert together.scores[2] == pytest.approx(alone.scores[0], abs=1e-3)


def test_ridge_equals_its_normal_equations():
    _, bank = sparse_truth(subsets=30)
    found = ridge_datamodel(bank)
    design, targets = bank.masks - bank.masks.mean(0), (bank.means - bank.means.mean(0)).T
    for query, penalty in enumerate(found.penalties):
        solved = np.linalg.solve(design.T @ design / 30 + penalty * np.eye(40), design.T @ targets[query] / 30)
        assert found.scores[query] == pytest.approx(solved)


def test_too_few_subsets_for_the_folds_are_refused():
    _, bank = sparse_truth(subsets=9)
    for method in (lasso_datamodel, ridge_datamodel, average_marginal_effects):
        with pytest.raises(InvalidInputError, match="at least 10"):
            method(bank)


def test_empirical_influence_is_a_difference_of_means():
    _, bank = sparse_truth(subsets=12)
    found, kept = empirical_influence(bank), bank.masks[:, 3]
    assert found[:, 3] == pytest.approx(bank.means[kept].mean(0) - bank.means[~kept].mean(0))
    masks = bank.masks.copy()
    masks[:, 3] = True
    with pytest.raises(InvalidInputError, match="kept by some"):
        empirical_influence(Retrainings(masks, bank.values))


def test_average_marginal_effects_of_a_linear_truth_are_its_effects_for_one_or_several_shares():
    for shares, off in (((0.5,), 0.1), ((0.35, 0.5, 0.65), 0.6)):
        effects, bank = sparse_truth(subsets=300, queries=2, shares=shares)
        found = average_marginal_effects(bank, path=6)
        assert found == pytest.approx(effects, abs=off)
        assert np.corrcoef(found.ravel(), effects.ravel())[0, 1] > 0.97


def utility(mask):
    """Two players who need each other, one who acts alone, one who does nothing."""
    return np.array([2.0 * (mask[0] and mask[1]) + 0.5 * mask[2] + 0.0 * mask[3], float(mask.sum() > 2)])


def test_banzhaf_of_all_subsets_equals_its_definition_and_axioms():
    bank = all_subsets(4, utility)
    found = data_banzhaf(bank)
    table = {tuple(mask): value for mask, value in zip(bank.masks, bank.means, strict=True)}
    for player in range(4):
        gains = []
        for mask in bank.masks[~bank.masks[:, player]]:
            joined = mask.copy()
            joined[player] = True
            gains.append(table[tuple(joined)] - table[tuple(mask)])
        assert found[:, player] == pytest.approx(np.mean(gains, axis=0))
    assert found[0, 0] == pytest.approx(found[0, 1])  # symmetry
    assert found[0, 3] == pytest.approx(0)  # null player
    doubled = data_banzhaf(Retrainings(bank.masks, bank.values @ np.array([[1.0], [3.0]])))
    assert doubled[0] == pytest.approx(found[0] + 3 * found[1])  # linearity
    with pytest.raises(InvalidInputError, match="half"):
        data_banzhaf(bank.of(np.flatnonzero(bank.masks.sum(1) > 2)))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_knn_shapley_equals_brute_force_and_is_efficient(k):
    generator = np.random.default_rng(k)
    n = 7
    similarities, labels = generator.normal(size=(4, n)), generator.integers(0, 2, n)
    wanted = generator.integers(0, 2, 4)
    found = knn_shapley(similarities, labels, wanted, k)

    def votes(query, subset):
        nearest = sorted(subset, key=lambda row: -similarities[query, row])[:k]
        return sum(labels[row] == wanted[query] for row in nearest) / k

    for query in range(4):
        for player in range(n):
            others = [row for row in range(n) if row != player]
            value = sum(
                (votes(query, (*subset, player)) - votes(query, subset)) / (n * comb(n - 1, size))
                for size in range(n)
                for subset in combinations(others, size)
            )
            assert found[query, player] == pytest.approx(value)
        assert found[query].sum() == pytest.approx(votes(query, range(n)))
