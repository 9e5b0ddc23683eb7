"""Average marginal effects: what adding an example changes, on average over subsets of random sizes.

Each subset draws its share p from a set P and keeps every example with probability p. Regress f on `x_i = 1/(√v p)` where i is kept and `−1/(√v (1 − p))` where
it is not, `v = E_p[1/(p(1 − p))]`, so that `E[x²] = 1`; the coefficient is `AME_i / √v`. Source: Lin et al. 2022, sections 3.1 and 3.2.

A bank of several shares averages over them; with one share this is the LASSO datamodel, and the effect is that at subsets of about that size.
"""

import numpy as np

from attribution_core.bank_methods.datamodels import cross_validated_lasso
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.retrainings import Retrainings


def average_marginal_effects(
    retrainings: Retrainings, shares: np.ndarray | None = None, *, folds: int = 5, path: int = 12, seed: int = 0
) -> np.ndarray:
    """Return scores, (queries, n), in units of the measurement.

    Args:
        retrainings: the bank.
        shares: p of each subset, (subsets,); the share that each one did keep by default.
        folds: of the cross-validation.
        path: penalties tried.
        seed: of the folds.

    Raises:
        InvalidInputError: if a share is not between 0 and 1, or there are too few finished subsets.
    """
    finished = retrainings.finished.any(1)
    bank = retrainings.usable
    kept = (retrainings.masks.mean(1) if shares is None else shares)[finished]
    if not ((kept > 0) & (kept < 1)).all():
        raise InvalidInputError(
            "average marginal effects need subsets that keep a share between 0 and 1, neither included"
        )
    scale = np.sqrt(np.mean(1 / (kept * (1 - kept))))
    features = np.where(bank.masks, 1 / kept[:, None], -1 / (1 - kept)[:, None]) / scale
    found = cross_validated_lasso(features, bank.means.T, folds=folds, path=path, seed=seed)
    return np.asarray(scale * found.scores)
