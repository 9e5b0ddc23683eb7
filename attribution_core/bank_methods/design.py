"""Which subsets to retrain next: those whose outputs the posterior knows least.

Greedy over candidates: take the one of largest posterior variance (in units of each query's noise, mean over queries), condition on it as if it had been
retrained (a Gaussian's variance needs no outcome), repeat. Source: Krause, Singh & Guestrin 2008, section 4, the entropy criterion.
"""

import numpy as np

from attribution_core.bank_methods.posterior import PosteriorDatamodel
from attribution_core.errors import InvalidInputError


def random_subsets(num_examples: int, kept_share: float, count: int, seed: int) -> np.ndarray:
    """Return masks of random subsets of one size, (count, n) bool."""
    generator = np.random.default_rng(seed)
    kept = round(kept_share * num_examples)
    masks = np.zeros((count, num_examples), bool)
    for mask in masks:
        mask[generator.permutation(num_examples)[:kept]] = True
    return masks


def widest_subsets(posterior: PosteriorDatamodel, candidates: np.ndarray, count: int) -> np.ndarray:
    """Return the chosen candidates' numbers in the order they were chosen, (count,).

    Args:
        posterior: what is known so far.
        candidates: masks, (candidates, n) bool.
        count: how many to choose.

    Raises:
        InvalidInputError: if there are fewer candidates.
    """
    if not 1 <= count <= len(candidates):
        raise InvalidInputError(f"between 1 and {len(candidates)} of the candidate subsets can be chosen")
    moved = candidates - posterior.contrasts.center
    covariance = posterior.covariance(moved, moved)  # (queries, candidates, candidates)
    noise = posterior.noise
    chosen: list[int] = []
    for _ in range(count):
        width = (np.diagonal(covariance, axis1=1, axis2=2) / noise[:, None]).mean(0)
        width[chosen] = -np.inf
        pick = int(width.argmax())
        chosen.append(pick)
        column = covariance[:, :, pick]
        gain = column[:, :, None] * column[:, None, :]
        covariance = covariance - gain / (column[:, pick] + noise)[:, None, None]
    return np.array(chosen)
