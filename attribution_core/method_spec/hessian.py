"""Influence functions with the mean loss's Hessian, or its Gauss-Newton part."""

from typing import ClassVar, Literal

from pydantic import Field

from attribution_core.method_spec.base import Damping, GroupEstimator, PerturbedMethodBase
from attribution_core.spec import Seed


class HessianMethod(PerturbedMethodBase):
    """A method whose curvature is the mean loss's Hessian, or its Gauss-Newton part."""

    damping: Damping = Field(
        default=0.1, description="Default damping, as a multiple of the curvature's mean eigenvalue."
    )
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    l2: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Strength of the L2 penalty `l2/2 ‖θ‖²` the model was trained with, added to the curvature.",
    )


class ExplicitMethod(HessianMethod):
    """Influence functions with the whole curvature matrix, for models of at most 4,096 attributed parameters."""

    reference: ClassVar[str] = "Koh & Liang 2017, Understanding Black-box Predictions via Influence Functions"
    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive", "newton")
    type: Literal["explicit"]

    @property
    def passes(self) -> tuple[str, ...]:
        """Passes of every member of the ensemble over the training set that a fit takes, in order."""
        return ("hessian", "features")


class CgMethod(HessianMethod):
    """Influence functions by conjugate gradients on Hessian-vector products over the training set."""

    self_influence: ClassVar[bool] = False
    reference: ClassVar[str] = "Martens 2010; Koh & Liang 2017, section 3"
    type: Literal["cg"]
    iterations: int = Field(default=50, ge=1, le=1000)
    tolerance: float = Field(default=1e-4, gt=0, lt=1, description="Relative residual at which a solve stops.")
    curvature_examples: int | None = Field(
        default=None, ge=1, description="Training examples used, evenly spread; all by default."
    )


class LissaMethod(HessianMethod):
    """Influence functions by a truncated Neumann series over mini-batches."""

    self_influence: ClassVar[bool] = False
    reference: ClassVar[str] = (
        "Agarwal et al. 2017, Second-Order Stochastic Optimization for Machine Learning in Linear Time"
    )
    type: Literal["lissa"]
    depth: int = Field(default=200, ge=1, le=100_000, description="Terms of the series; one mini-batch each.")
    batch: int = Field(default=256, ge=1, le=65_536, description="Examples per term.")
    seed: Seed = 0


class ArnoldiMethod(HessianMethod):
    """Influence functions in the span of the curvature's leading eigenvectors, found by Arnoldi iteration."""

    reference: ClassVar[str] = "Schioppa et al. 2022, Scaling Up Influence Functions"
    type: Literal["arnoldi"]
    iterations: int = Field(default=100, ge=2, le=2000, description="Dimension of the Krylov space.")
    rank: int = Field(default=50, ge=1, le=2000, description="Eigenvectors kept.")
    seed: Seed = 0

    @property
    def passes(self) -> tuple[str, ...]:
        """Passes of every member of the ensemble over the training set that a fit takes, in order."""
        return ("krylov", "features")
