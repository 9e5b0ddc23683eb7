"""Which subsets a method can learn from, told before anything is retrained; free of torch."""

import numpy as np

from attribution_core.errors import InvalidInputError, located
from attribution_core.fit_spec import FitSpec
from attribution_core.method_spec import BankMethodBase, MagicMethod
from attribution_core.training.spec import Protocol, check_subsets, subset_mask


def check_retrainings(spec: FitSpec) -> None:
    """Refuse subsets of which some would keep nothing or everything, or from which the method could never learn.

    Raises:
        InvalidInputError: naming what of the method is wrong.
    """
    match spec.method:
        case MagicMethod(subsets=subsets, alpha=alpha) if subsets:
            with located("/method/alpha"):
                subset_mask(Protocol(alpha=alpha, subsets=subsets), spec.dataset.num_examples, 0)
        case BankMethodBase():
            assert spec.recipe is not None
            with located("/method/bank/alpha"):
                check_subsets(spec.method.bank, spec.recipe, spec.dataset.num_examples)
            _check_bank(spec.method, spec.method.type, spec.dataset.num_examples)


def _check_bank(method: BankMethodBase, kind: str, n: int) -> None:
    bank = method.bank
    if bank.subsets < method.least_subsets:
        raise InvalidInputError(
            f"{kind} needs at least {method.least_subsets} subsets to learn from", "/method/bank/subsets"
        )
    kept = int(subset_mask(bank, n, 0).sum())
    low, high = method.shares
    if not low <= kept / n <= high:
        raise InvalidInputError(
            f"{kind} needs subsets that keep between {low:g} and {high:g} of the examples; these keep {kept} of {n}",
            "/method/bank/alpha",
        )
    if method.contrasts:
        counts = np.zeros(n, np.int64)
        for number in range(bank.subsets):
            counts += subset_mask(bank, n, number)
        missing = int(((counts == 0) | (counts == bank.subsets)).sum())
        if missing:
            raise InvalidInputError(
                f"{missing} of {n} examples would be kept by every subset or by none, which tells nothing of them: name more subsets",
                "/method/bank/subsets",
            )
