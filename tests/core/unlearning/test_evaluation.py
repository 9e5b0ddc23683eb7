"""The divergence of margins against what it must be."""

import numpy as np
import pytest
import torch

from attribution_core.unlearning.evaluation import BINS, MAX_KLOM, compared, klom, klom_estimator, summary


def samples(models: int, mean: float, std: float = 1.0, seed: int = 0, examples: int = 4) -> np.ndarray:
    return mean + std * np.random.default_rng(seed).standard_normal((models, examples))


@pytest.mark.parametrize("models", [3, 40])
def test_equal_models_do_not_diverge_and_distant_ones_reach_the_limit(models: int) -> None:
    values = samples(models, 2.0)
    assert np.allclose(klom(values, values), 0, atol=1e-9)
    assert np.allclose(klom(values, values + 60), MAX_KLOM, rtol=0.06)
    assert np.allclose(klom(values + 500, values + 900), 0, atol=1e-9)  # cut at 100


def test_few_models_are_taken_for_normal_ones() -> None:
    first, second = samples(7, 1.0, 0.5), samples(3, 2.0, 1.5, seed=1)
    p = torch.distributions.Normal(torch.tensor(first.mean(0)), torch.tensor(first.std(0, ddof=1)))
    variance = (2 * second.var(0, ddof=1) + 4 * first.var(0, ddof=1)) / 6
    q = torch.distributions.Normal(torch.tensor(second.mean(0)), torch.tensor(variance).sqrt())
    expected = torch.distributions.kl_divergence(p, q).numpy()
    assert expected.max() < MAX_KLOM
    assert np.allclose(klom(first, second), expected)
    single = klom(first, second[:1])  # one model has no spread of its own
    assert np.allclose(single, np.minimum((first.mean(0) - second[0]) ** 2 / (2 * first.var(0, ddof=1)), MAX_KLOM))
    assert klom_estimator(100, 19) == "normal"


def test_models_that_scatter_are_not_near() -> None:
    """A wide spread does not buy nearness: what is broken differs, wherever its mean is."""
    oracles = samples(10, 1.0)
    assert klom(oracles, samples(10, 1.0, 20.0, seed=1)).min() > 1
    assert klom(oracles, samples(10, 1.0, seed=1)).max() < 1


def test_many_models_are_binned() -> None:
    first, second = samples(50, 0.0), samples(80, 1.0, 2.0, seed=1)
    assert klom_estimator(50, 80) == "binned"
    found = klom(first, second)
    for place in range(first.shape[1]):
        low = min(first[:, place].min(), second[:, place].min())
        width = (max(first[:, place].max(), second[:, place].max()) - low) / BINS
        p, q = np.full(BINS, 1e-5), np.full(BINS, 1e-5)
        for share, values in ((p, first[:, place]), (q, second[:, place])):
            for value in values:
                share[min(BINS - 1, int((value - low) / width))] += 1 / len(values)
        p, q = p / p.sum(), q / q.sum()
        assert found[place] == pytest.approx(float((p * np.log(p / q)).sum()), rel=0.05)


def test_both_estimators_agree_on_many_normal_margins() -> None:
    first, second = samples(4000, 0.0, examples=1), samples(4000, 0.7, seed=1, examples=1)
    assert klom(first, second)[0] == pytest.approx(0.7**2 / 2, rel=0.15)
    p, q = (
        torch.distributions.Normal(values.mean(), values.std())
        for values in (torch.tensor(first[:15]), torch.tensor(second))
    )
    assert klom(first[:15], second)[0] == pytest.approx(float(torch.distributions.kl_divergence(p, q)), rel=0.02)


def test_a_comparison_has_gaps_of_models_minus_oracles() -> None:
    oracles = {"values": samples(6, 1.0), "losses": np.full((6, 4), 0.5), "correct": np.ones((6, 4))}
    models = {"values": samples(2, 3.0), "losses": np.full((2, 4), 2.0), "correct": np.eye(4)[:2]}
    found = compared(oracles, models)
    assert found["loss_gap"] == pytest.approx(1.5)
    assert found["accuracy_gap"] == pytest.approx(0.25 - 1)
    assert found["distance"] == pytest.approx(np.abs(models["values"].mean(0) - oracles["values"].mean(0)).mean())
    assert found["klom_median"] <= found["klom_p95"] <= MAX_KLOM


def test_tasks_without_classes_have_no_accuracy_and_two_oracles_no_halves() -> None:
    oracles = {"values": samples(2, 1.0), "losses": np.full((2, 4), 0.5)}
    assert compared(oracles, oracles)["accuracy_gap"] is None
    assert summary(oracles) == {"loss": 0.5, "accuracy": None, "klom_of_halves": None}
