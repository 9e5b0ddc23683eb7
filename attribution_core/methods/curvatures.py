"""The curvature under each checkpoint, as the method has it: from fitted arrays, or solved by passes over training examples."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from attribution_core.curvature import Curvature, EkfacFactors, Identity
from attribution_core.curvature.base import Multiple
from attribution_core.curvature.dense import Spectral
from attribution_core.curvature.fisher import Fisher
from attribution_core.curvature.iterative import ConjugateGradient, DataInf, GaussNewton, Lissa
from attribution_core.curvature.products import HessianProducts
from attribution_core.curvature.row_factor import RowFactor
from attribution_core.curvature.rows import PseudoRows
from attribution_core.data.batch import Batch
from attribution_core.method_spec import (
    ArnoldiMethod,
    CgMethod,
    DataInfMethod,
    DiagonalMethod,
    EkfacMethod,
    ExplicitMethod,
    GaussNewtonMethod,
    HessianMethod,
    KfacMethod,
    LissaMethod,
    TracinMethod,
)
from attribution_core.progress import Progress

if TYPE_CHECKING:
    from attribution_core.methods.context import FitContext

Arrays = Mapping[str, np.ndarray]


class Curvatures:
    """Builds the curvatures of one context."""

    def __init__(self, context: "FitContext") -> None:
        self._context = context

    def products(self, number: int) -> HessianProducts:
        """Return products with the Hessian under one checkpoint."""
        checkpoint, method = self._context.checkpoint(number), self._context.spec.method
        assert isinstance(method, HessianMethod)
        return HessianProducts(checkpoint.capture, self._context.task, method.curvature, method.l2)

    def of(self, number: int, fitted: Arrays) -> Curvature:
        """Return the curvature of one checkpoint from its fitted arrays, as far as they exist."""
        spec, blocks, drawn = (
            self._context.spec.method,
            self._context.checkpoint(number).capture.blocks,
            self._context.pseudo_gradients,
        )
        match spec:
            case GaussNewtonMethod():
                make = partial(drawn.chosen, number, fitted)
                return self._gauss_newton(spec, number, fitted, partial(drawn.kept, number, make))
            case EkfacMethod() | KfacMethod() | DiagonalMethod():
                return EkfacFactors.from_arrays(blocks, fitted, self._context.device)
            case DataInfMethod():
                empirical = Fisher("empirical", 1, 0)
                make = partial(drawn.rows, number, empirical, spec.curvature_examples)
                return DataInf(partial(drawn.kept, number, make))
            case ExplicitMethod():
                return Spectral.from_arrays(blocks, fitted, self._context.device, self.products(number))
            case ArnoldiMethod():
                return Spectral.from_arrays(blocks, fitted, self._context.device)
            case CgMethod():
                used = self._context.spread(spec.curvature_examples)
                batches = partial(self._context.batches, number, used)
                return ConjugateGradient(self.products(number), batches, blocks, spec.iterations, spec.tolerance)
            case LissaMethod():
                return Lissa(
                    self.products(number), partial(self._drawn, spec), partial(self._context.batches, number), blocks
                )
            case TracinMethod():
                # A score of one step on one example's loss, where the other methods' is of the mean loss.
                return Multiple(self._context.share(number) * self._context.spec.num_training)
        return Identity()

    def _gauss_newton(
        self, spec: GaussNewtonMethod, number: int, fitted: Arrays, rows: Callable[[], PseudoRows]
    ) -> GaussNewton:
        factors = EkfacFactors.from_arrays(
            self._context.checkpoint(number).capture.blocks, fitted, self._context.device
        )
        factor = RowFactor.from_arrays(fitted, self._context.device)
        return GaussNewton(rows, factors, spec.iterations, spec.tolerance, self._context.defaults.shrinkage, factor)

    def factorised(self, number: int, fitted: Arrays, damping: float, progress: Progress) -> dict[str, np.ndarray]:
        """Return what a fit of `gauss_newton` keeps of a checkpoint's pseudo-gradients: which they are, and their factorisation if there is one.

        Nothing of rows that are more than parameters: to list them would take more than the matrix that is formed of them.

        Args:
            number: the checkpoint's.
            fitted: its EK-FAC factors.
            damping: of the factorisation.
            progress: asked between batches and between blocks of rows whether the work should stop.

        Raises:
            Cancelled: if it should.
        """
        spec = self._context.spec.method
        assert isinstance(spec, GaussNewtonMethod)
        rows = self._context.pseudo_gradients.chosen(number, fitted, progress)
        factor = self._gauss_newton(spec, number, fitted, lambda: rows).factorised(damping)
        if rows.has_matrix:
            return {}
        return rows.selection.arrays() | ({} if factor is None else factor.arrays())

    def _drawn(self, method: LissaMethod) -> Iterator[Batch]:
        """Yield LiSSA's mini-batches."""
        generator = np.random.default_rng(method.seed)
        rows = self._context.training_rows
        for _ in range(method.depth):
            chosen = generator.choice(len(rows), min(method.batch, len(rows)), replace=False)
            yield self._context.source.batch(rows[np.sort(chosen)])
