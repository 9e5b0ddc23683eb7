"""The additive datamodel: `f̂_z(S') = f_z(S) - Σ_{i ∈ S∖S'} τ_i(z)`; every endpoint is this identity plugged in."""

import numpy as np


def removed_rows(num_examples: int, *, remove: np.ndarray | None = None, keep: np.ndarray | None = None) -> np.ndarray:
    """Return the sorted training rows that a changed training set leaves out, given what is removed or what is kept."""
    if keep is not None:
        return np.setdiff1d(np.arange(num_examples), keep)
    assert remove is not None
    return np.unique(remove)


def predicted_change(group_effects: np.ndarray) -> np.ndarray:
    """Return the measurement's predicted change when groups are left out: minus what having them is worth."""
    return -group_effects
