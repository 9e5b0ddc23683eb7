"""What an index keeps of an evaluation: coverage for queries and subsets that took no part in fitting it, and honesty outside."""

import numpy as np
import pytest

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.retrainings import Retrainings
from attribution_core.evaluate.served import ServedCalibration, fit_served

N, QUERIES, SUBSETS = 60, 120, 48
SLOPE = 0.4


def world(seed: int) -> tuple[np.ndarray, Retrainings, np.ndarray]:
    """Scores that over-predict by 1/0.4, of very different sizes between queries, and retrainings with noise of their own."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(QUERIES, N)) * np.exp(generator.normal(size=(QUERIES, 1)))
    full = generator.normal(size=QUERIES)
    masks = np.zeros((SUBSETS, N), bool)
    for mask in masks:
        mask[generator.permutation(N)[: N // 2]] = True
    removed = SLOPE * scores @ (~masks).T  # (queries, subsets)
    noise = generator.normal(size=removed.shape) * np.sqrt(0.1 + 0.05 * np.square(scores).sum(1, keepdims=True))
    return scores, Retrainings(masks, (full[:, None] - removed + noise).T[:, None]), full


def inside(
    served: ServedCalibration, scores: np.ndarray, masks: np.ndarray, changes: np.ndarray, level: float
) -> float:
    hits = []
    for query in range(len(scores)):
        for number, mask in enumerate(masks):
            left_out = scores[query, ~mask]
            found = served.predict(-left_out.sum(), np.square(left_out).sum(), len(left_out), level)
            low, high = found["interval"]
            assert low <= found["change"] <= high
            hits.append(low <= changes[query, number] <= high)
    return float(np.mean(hits))


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_intervals_cover_new_queries_under_new_subsets(level: float) -> None:
    covered = []
    for seed in range(4):
        scores, bank, full = world(seed)
        asked, others = np.arange(QUERIES) % 2 == 0, np.arange(QUERIES) % 2 == 1
        known, new = np.arange(32), np.arange(32, SUBSETS)
        fitted = Retrainings(bank.masks[known], bank.values[known][:, :, asked])
        served = fit_served(scores[asked], fitted, full[asked])
        changes = bank.means.T[others][:, new] - full[others, None]
        covered.append(inside(served, scores[others], bank.masks[new], changes, level))
    assert np.mean(covered) == pytest.approx(level, abs=0.05)


def test_the_map_corrects_the_slope_and_survives_json() -> None:
    scores, bank, full = world(0)
    served = fit_served(scores, bank, full)
    again = ServedCalibration.from_json(served.as_json())
    found = [one.predict(-10.0, 4.0, N // 2, 0.9) for one in (served, again)]
    assert found[0] == found[1]
    assert found[0]["change"] == pytest.approx(-10 * SLOPE, rel=0.15)


def test_what_retraining_did_not_cover_stays_as_it_is_and_says_so() -> None:
    served = fit_served(*world(1))
    assert served.predict(-3.0, 1.0, 2, 0.9) == {"change": -3.0, "interval": None, "calibrated": False}
    assert served.predict(-3.0, 1.0, N // 2, None)["interval"] is None
    assert served.predict(-3.0, 1.0, N // 2, 0.99)["interval"] is None, "24 subsets cannot state 99 %"


def test_too_few_retrainings_are_refused() -> None:
    scores, bank, full = world(2)
    with pytest.raises(InvalidInputError):
        fit_served(scores, bank.of(np.arange(1)), full)
