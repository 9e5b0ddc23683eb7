"""Data Banzhaf values by maximum sample reuse: every retraining informs every example.

`φ_i = E_S[f(S ∪ i) − f(S∖i)]` over subsets that keep each example with probability ½, estimated by
`mean(f(S): i ∈ S) − mean(f(S): i ∉ S)`. Source: Wang & Jia 2023, section 4.2. On a bank of independent coin flips this is the empirical influence; on a
bank of halves of one size the two halves' means differ by an extra term of order 1/n.
"""

import numpy as np

from attribution_core.bank_methods.empirical_influence import empirical_influence
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.retrainings import Retrainings


def data_banzhaf(retrainings: Retrainings, *, tolerance: float = 0.1) -> np.ndarray:
    """Return Banzhaf values, (queries, n), in units of the measurement.

    Raises:
        InvalidInputError: if subsets keep another share than half on average, by more than the tolerance, or an example is never or always kept.
    """
    share = float(retrainings.usable.masks.mean())
    if abs(share - 0.5) > tolerance:
        raise InvalidInputError(f"Banzhaf values need subsets that keep half of the examples; these keep {share:.2f}")
    return empirical_influence(retrainings)
