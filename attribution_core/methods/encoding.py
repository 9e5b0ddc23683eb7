"""From gradients of training examples to what a shard of the features stage stores of them."""

from functools import cached_property

import numpy as np

from attribution_core.curvature.fisher import Observed
from attribution_core.data.batch import Batch
from attribution_core.features.factors import encoded
from attribution_core.features.rows import signs
from attribution_core.methods.base import FeatureMethod, GradientMethod, QuerySide, TrainRows
from attribution_core.methods.context import FitContext
from attribution_core.methods.finite import check_squares, refuse_example
from attribution_core.methods.recall import recall_rows

Arrays = dict[str, np.ndarray]
# What arrays of a shard are called: whole gradients as factors, by block, and the exact scores by which recall is measured.
GRADIENT = "gradient."
EXACT = "exact"


class Encoder:
    """Encodes training examples under one checkpoint."""

    def __init__(self, context: FitContext, method: FeatureMethod) -> None:
        self._context = context
        self._method = method

    def arrays(self, part: Observed | Batch) -> Arrays:
        """Return what is stored of a batch, (batch, …) each.

        Raises:
            InvalidInputError: if the model gives no finite gradient for one of the examples.
        """
        method, context = self._method, self._context
        if not isinstance(method, GradientMethod):
            assert isinstance(part, Batch)
            found = method.encode_train(part)
            _check_finite(found, part)
            return self._stored(found)
        observed = method.observe(part).compact() if isinstance(part, Batch) else part
        observed = observed.tempered(method.tempering)
        found = method.encode_observed(observed)
        _check_finite(found, observed.batch)
        arrays = self._stored(found)
        if context.layout == "vectors" or context.lossy:
            assert self.recall_side is not None
            arrays[EXACT] = method.observed_scores(self.recall_side, observed).T.cpu().numpy()
        if context.layout == "factors":
            if not method.curvature.solves_cheaply:  # no query is solved that would show it
                check_squares(observed)
            assert context.row_type != "binary"
            stored = encoded(observed.training, context.row_type, method.rotations)
            _check_scales(stored, observed.batch)
            arrays |= {f"{GRADIENT}{name}": value for name, value in stored.items()}
        return arrays

    def _stored(self, found: TrainRows) -> Arrays:
        """Return what is known by name, rows as bits where they are stored so: floats of many numbers would fill memory until then."""
        arrays = found.arrays()
        return arrays | signs(arrays.pop("rows")) if self._context.row_type == "binary" else arrays

    @cached_property
    def recall_side(self) -> QuerySide | None:
        """The preconditioned queries by which recall is measured; None where preconditioning takes what only all rows give."""
        method, context = self._method, self._context
        if not isinstance(method, GradientMethod):
            return None
        queries = context.source.batch(recall_rows(context.training_rows))
        return method.precondition(method.encode_query(queries), method.default_damping)


def _check_scales(stored: Arrays, batch: Batch) -> None:
    scales = np.stack([value for name, value in stored.items() if name.endswith(".scale")])
    unusable = ~np.isfinite(scales).all(axis=0)
    if unusable.any():
        refuse_example(int(batch.rows[int(np.flatnonzero(unusable)[0])]))


def _check_finite(found: TrainRows, batch: Batch) -> None:
    finite = found.rows.isfinite().all(dim=1) & found.weights.isfinite()
    if not bool(finite.all()):
        refuse_example(int(batch.rows[~finite][0]))
