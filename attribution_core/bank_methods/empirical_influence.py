"""Empirical influence: how much higher the output is where an example was kept than where it was not.

`τ_i(z) = E[f_z(S) | i ∈ S] − E[f_z(S) | i ∉ S]`. Source: Feldman & Zhang 2020, equation 2 (their estimator over random subsets).
"""

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.retrainings import Retrainings


def empirical_influence(retrainings: Retrainings) -> np.ndarray:
    """Return scores, (queries, n), in units of the measurement.

    Raises:
        InvalidInputError: if an example is in every subset or in none.
    """
    bank = retrainings.usable
    kept = bank.masks.astype(np.float64)
    count = kept.sum(0)
    if not ((count > 0) & (count < len(kept))).all():
        raise InvalidInputError("every example must be kept by some finished subsets and left out by others")
    with_it = bank.means.T @ kept / count
    without = bank.means.T @ (1 - kept) / (len(kept) - count)
    return np.asarray(with_it - without)
