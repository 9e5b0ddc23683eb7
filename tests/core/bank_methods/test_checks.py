"""What is refused before retraining is just what a method would refuse after it."""

import numpy as np
import pytest

from attribution_core.bank_methods.ame import average_marginal_effects
from attribution_core.bank_methods.banzhaf import data_banzhaf
from attribution_core.bank_methods.datamodels import lasso_datamodel, ridge_datamodel
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.retrainings import Retrainings
from attribution_core.method_spec import AmeMethod, BanzhafMethod, DatamodelsMethod
from attribution_core.training.spec import Protocol, subset_mask


def bank(subsets: int, alpha: float = 0.5, n: int = 20) -> Retrainings:
    masks = np.stack([subset_mask(Protocol(alpha=alpha, subsets=subsets), n, number) for number in range(subsets)])
    return Retrainings(masks, np.random.default_rng(0).normal(size=(subsets, 1, 2)))


@pytest.mark.parametrize("fit", [lasso_datamodel, ridge_datamodel, average_marginal_effects])
def test_fewest_subsets(fit) -> None:  # type: ignore[no-untyped-def]
    least = AmeMethod.least_subsets
    assert least == DatamodelsMethod.least_subsets
    fit(bank(least))
    with pytest.raises(InvalidInputError):
        fit(bank(least - 1))


def test_shares_of_banzhaf_values() -> None:
    low, high = BanzhafMethod.shares
    for share in (low, high):
        data_banzhaf(bank(64, share))
    for share in (low - 0.05, high + 0.05):
        with pytest.raises(InvalidInputError):
            data_banzhaf(bank(64, share))
