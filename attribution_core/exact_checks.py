"""Whether leaving single examples out of a linear model leaves one that is determined, told before anything is fitted; free of torch."""

from collections.abc import Sequence

import numpy as np

from attribution_core.data.reader import DatasetReader
from attribution_core.errors import InvalidInputError
from attribution_core.fit_spec import FitSpec
from attribution_core.method_spec import ExactMethod
from attribution_core.references import DatasetRef

# Numbers of a training set that are looked at in a request: less than a tenth of a second. Of larger ones the fit tells.
_MAX_NUMBERS = 500_000
_MAX_FEATURES = 512
_NEAR = 1e-9


def determining_row(dataset: DatasetRef, left_out: Sequence[int], bias: bool) -> int | None:
    """Return the first row without which the others do not span the features (leverage 1), None if there is none or the set is large."""
    rows = np.setdiff1d(np.arange(dataset.num_examples), np.asarray(left_out, np.int64))
    if len(rows) == 1:
        return int(rows[0])
    reader = DatasetReader(dataset.folder, dataset.spec)
    width = int(np.prod(reader.input_shape or [len(dataset.spec.input)])) + bias
    if width > _MAX_FEATURES or len(rows) * width > _MAX_NUMBERS:
        return None
    features = np.stack([np.ravel(value) for value in reader.read(rows).inputs]).astype(np.float64)
    if bias:
        features = np.column_stack([features, np.ones(len(features))])
    left, values, _ = np.linalg.svd(features, full_matrices=False)
    basis = left[:, values > values.max(initial=0) * max(features.shape) * np.finfo(np.float64).eps]
    alone = np.flatnonzero((basis**2).sum(1) > 1 - _NEAR)
    return int(rows[alone[0]]) if len(alone) else None


def check_exact(spec: FitSpec) -> None:
    """Refuse exact leave-one-out where what it leaves is no training set, or does not determine the model.

    Raises:
        InvalidInputError: naming the data set or the penalty.
    """
    method = spec.method
    if not isinstance(method, ExactMethod):
        return
    relieved = method.l2 == 0 or method.regulariser == "per_example"
    if spec.num_training == 1 and relieved:
        raise InvalidInputError(
            "exact leaves single examples out, and of one example nothing would be left", "/dataset"
        )
    if method.l2 > 0 or method.estimator == "influence":
        return
    row = determining_row(spec.dataset, spec.left_out, bool(spec.architecture.arguments.get("bias", True)))
    if row is not None:
        raise InvalidInputError(
            f"without row {row} the others do not determine the model (leverage 1): give the l2 > 0 that it was trained with, or use ekfac",
            "/method/l2",
        )
