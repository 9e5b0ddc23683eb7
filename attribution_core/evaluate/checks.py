"""What an evaluation asks for and cannot have, told before anything is retrained; free of torch."""

import numpy as np

from attribution_core.data.reader import DatasetReader
from attribution_core.errors import InvalidInputError, located
from attribution_core.evaluate.spec import EvaluationSpec
from attribution_core.training.spec import check_subsets


def check_evaluation(spec: EvaluationSpec) -> None:
    """Refuse what could only fail after the retrainings.

    Raises:
        InvalidInputError: naming the field.
    """
    _check_banks(spec)
    if spec.tune and not spec.fit.method.damped:
        raise InvalidInputError(f"{spec.fit.method.type} has no damping to tune", "/tune")
    _check_sets(spec)
    training = DatasetReader(spec.train.dataset.folder, spec.train.dataset.spec)
    _check_mislabelled(spec, training)
    _check_source(spec, training)


def _check_banks(spec: EvaluationSpec) -> None:
    for number, bank in enumerate(spec.banks):
        if bank.protocol.sizes == "varied":
            raise InvalidInputError("subsets of one size tell how examples rank: say fixed", "/protocol/sizes")
        with located(f"/deterministic/{number - 1}" if number else "/protocol/alpha"):
            check_subsets(bank.protocol, spec.train.recipe, spec.train.dataset.num_examples, spec.train.left_out)


def _check_sets(spec: EvaluationSpec) -> None:
    n = spec.train.num_training
    if spec.removal is not None:
        with located("/removal/top"):
            if max(spec.removal.top) >= n:
                raise InvalidInputError(f"of {n} training examples up to {n - 1} can be left out")
            spec.train.recipe.check_steps(n - max(spec.removal.top))
    if spec.loo is not None:
        with located("/loo"):
            spec.train.recipe.check_steps(n - 1)


def _check_mislabelled(spec: EvaluationSpec, training: DatasetReader) -> None:
    if spec.mislabelled is None:
        return
    rows = spec.train.training_rows
    with located("/mislabelled"):
        count = len(np.intersect1d(training.matching(spec.mislabelled), rows))
    if not 0 < count < len(rows):
        raise InvalidInputError(
            f"{count} of {len(rows)} training examples are mislabelled: some must be, and some not", "/mislabelled"
        )


def _check_source(spec: EvaluationSpec, training: DatasetReader) -> None:
    if spec.source is None:
        return
    asked = DatasetReader(spec.queries.folder, spec.queries.spec)
    if any(spec.source not in reader.metadata_columns for reader in (training, asked)):
        raise InvalidInputError(f"there is no metadata column {spec.source[:80]!r} in both data sets", "/source")
    if len({str(value) for value in training.metadata(spec.source, spec.train.training_rows)}) < 2:
        raise InvalidInputError("training examples must be of at least two sources", "/source")
