"""Which subsets a method can learn from, told before anything is retrained; free of torch."""

import numpy as np

from attribution_core.bank_methods.semivalues import SizeWeights, check_sizes
from attribution_core.errors import InvalidInputError, located
from attribution_core.fit_spec import FitSpec
from attribution_core.method_spec import BankMethodBase, MagicMethod, SemivalueMethodBase
from attribution_core.training.spec import Protocol, check_subsets, subset_mask, subset_size


def check_retrainings(spec: FitSpec) -> None:
    """Refuse subsets of which some would keep nothing or everything, or from which the method could never learn.

    Raises:
        InvalidInputError: naming what of the method is wrong.
    """
    match spec.method:
        case MagicMethod(subsets=subsets, alpha=alpha) if subsets:
            with located("/method/alpha"):
                subset_mask(Protocol(alpha=alpha, subsets=subsets), spec.dataset.num_examples, 0)
        case BankMethodBase() as method:
            assert spec.recipe is not None
            _check_kind(method, method.type)
            with located("/method/bank/sizes" if method.sizes == "varied" else "/method/bank/alpha"):
                check_subsets(method.bank, spec.recipe, spec.dataset.num_examples)
            _check_bank(method, method.type, spec.dataset.num_examples)


def _check_kind(method: BankMethodBase, kind: str) -> None:
    if method.bank.sizes != method.sizes:
        wanted = "subsets of varied sizes: say varied" if method.sizes == "varied" else "subsets of one size: say fixed"
        raise InvalidInputError(f"{kind} learns from {wanted}", "/method/bank/sizes")
    if method.bank.subsets < method.least_subsets:
        raise InvalidInputError(
            f"{kind} needs at least {method.least_subsets} subsets to learn from", "/method/bank/subsets"
        )


def _check_bank(method: BankMethodBase, kind: str, n: int) -> None:
    if isinstance(method, SemivalueMethodBase):
        _check_semivalue(method, n)
    else:
        _check_share(method, kind, n)
    if method.contrasts:
        _check_contrasts(method.bank, n)


def _check_share(method: BankMethodBase, kind: str, n: int) -> None:
    low, high = method.shares
    kept = subset_size(method.bank, n, 0)
    if not low <= kept / n <= high:
        raise InvalidInputError(
            f"{kind} needs subsets that keep between {low:g} and {high:g} of the examples; these keep {kept} of {n}",
            "/method/bank/alpha",
        )


def _check_semivalue(method: SemivalueMethodBase, n: int) -> None:
    sizes = np.array([subset_size(method.bank, n, number) for number in range(method.bank.subsets)])
    with located("/method/bank/subsets"):
        check_sizes(sizes, SizeWeights.beta(n, *method.parameters))


def _check_contrasts(bank: Protocol, n: int) -> None:
    """Refuse subsets, none and all examples not counted, of which none or all keep an example."""
    counts, subsets = np.zeros(n, np.int64), 0
    for number in range(bank.subsets):
        if 0 < subset_size(bank, n, number) < n:
            counts += subset_mask(bank, n, number)
            subsets += 1
    missing = int(((counts == 0) | (counts == subsets)).sum())
    if missing:
        raise InvalidInputError(
            f"{missing} of {n} examples would be kept by every subset or by none, which tells nothing of them: name more subsets",
            "/method/bank/subsets",
        )
