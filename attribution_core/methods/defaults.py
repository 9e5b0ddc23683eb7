"""What a fit takes where its method names nothing, as told by the model, the task and the fitted spectrum."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from attribution_core.curvature.ekfac import concentration
from attribution_core.curvature.row_factor import RowFactor
from attribution_core.method_spec import (
    DAMPING_OF_COPIES,
    DEFAULT_SHRINKAGE,
    SHRINKAGE_OF_COPIES,
    FisherMethod,
    GaussNewtonMethod,
    TemperedMethodBase,
)
from attribution_core.methods.fitted import DEFAULT_DAMPING, WHITENED, of_checkpoint

if TYPE_CHECKING:
    from attribution_core.methods.context import FitContext


class Defaults:
    """Chooses what the method of one context leaves open."""

    def __init__(self, context: "FitContext") -> None:
        self._context = context

    def damping(self, fitted: Mapping[str, np.ndarray]) -> float | None:
        """Return the damping where a query names none; None for methods without.

        An index keeps that of its fit, as does what extends it: its rows' self-influence is at one damping.
        """
        method = self._context.spec.method
        if not isinstance(method, FisherMethod) or method.damping is not None:
            return getattr(method, "damping", None)
        own = of_checkpoint(fitted, 0)
        for name in (DEFAULT_DAMPING, WHITENED):  # indexes of before the first was kept have the second, if any
            if name in own:
                return _rounded(own[name][0])
        if (damping := RowFactor.damping_of(own)) is not None:  # likewise
            return damping
        eigenvalues = (value for name, value in fitted.items() if ".eigenvalues." in name)
        multiple = DAMPING_OF_COPIES if self.shrinks_less else 1.0
        return _rounded(multiple * method.damping_for(concentration(eigenvalues)))

    @cached_property
    def shrinks_less(self) -> bool:
        """Whether `gauss_newton` is left to choose its shrinkage, and has copies whose matrices are exact: those of sampled labels need as much as one."""
        method = self._context.spec.method
        chooses = isinstance(method, GaussNewtonMethod) and method.shrinkage is None
        return chooses and method.copies > 0 and self._context.pseudo_gradients.exact

    @property
    def shrinkage(self) -> float:
        """EK-FAC's weight ρ in `gauss_newton`."""
        method = self._context.spec.method
        assert isinstance(method, GaussNewtonMethod)
        if method.shrinkage is not None:
            return method.shrinkage
        return SHRINKAGE_OF_COPIES if self.shrinks_less else DEFAULT_SHRINKAGE

    @cached_property
    def residual_power(self) -> float:
        """The power of residuals in a new fit; 1 for methods that have the derivative, and tasks without a `1 - p`."""
        method = self._context.spec.method
        if not isinstance(method, TemperedMethodBase) or not self._context.has_shortfalls:
            return 1.0
        if method.residual_power is not None:
            return method.residual_power
        # A model of one layer is linear in its parameters: its loss is convex, and the derivative right.
        parts = self._context.checkpoint(0).module.modules()
        layers = sum(next(part.parameters(recurse=False), None) is not None for part in parts)
        return method.default_residual_power if layers > 1 else 1.0


def _rounded(value: float) -> float:
    """Return three significant digits, which come out of a stored float32 as they went in."""
    return float(f"{value:.3g}")
