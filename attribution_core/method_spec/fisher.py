"""Influence functions with the model's Fisher matrix, or the data's."""

import math
from typing import ClassVar, Literal

from pydantic import Field

from attribution_core.method_spec.base import (
    LAYER_DAMPING,
    Damping,
    GradientMethodBase,
    GroupEstimator,
    PerturbedMethodBase,
    TemperedMethodBase,
)
from attribution_core.spec import Seed

# The least default damping, which keeps rounding small, and the concentration of the spectrum from which it is the largest.
MIN_DEFAULT_DAMPING = 0.001
MOST_CONCENTRATED = 800
# EK-FAC's weight in `gauss_newton`; and over perturbed copies, where a part of what it guards against averages out, with how many times the default damping.
DEFAULT_SHRINKAGE = 0.8
SHRINKAGE_OF_COPIES = 0.5
DAMPING_OF_COPIES = 2.0


class FisherSampling(GradientMethodBase):
    """A method whose curvature is the model's Fisher matrix."""

    fisher: Literal["auto", "exact", "sampled", "empirical"] = Field(
        default="auto",
        description="Labels enumerated, sampled from the model, or the data's. auto enumerates up to 32 classes, or takes fewer directions of "
        "the outputs where these have 99 % of their Fisher matrix, and samples of more classes.",
    )
    samples: int = Field(default=1, ge=1, le=64, description="Labels sampled per example.")
    seed: Seed = 0


class FisherMethod(FisherSampling, TemperedMethodBase):
    """A method that inverts the Fisher matrix."""

    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive", "newton")
    # The largest default damping.
    max_default: ClassVar[float] = 3.0
    damping: Damping | None = Field(
        default=None,
        description="Default damping, as a multiple of each layer's mean eigenvalue. If null, it follows from how concentrated the fitted curvature is: "
        "the fewer of a layer's eigenvalues have most of their sum, the larger the default is, up to a bound.",
    )

    def damping_for(self, concentration: float) -> float:
        """Return the default damping, which where none is named grows with the concentration of the curvature's spectrum.

        The law and its constants are measured: docs/studies/curvature.md.

        Args:
            concentration: of the fitted eigenvalues (`attribution_core.curvature.ekfac.concentration`).
        """
        if self.damping is not None:
            return self.damping
        share = min(concentration / MOST_CONCENTRATED, 1.0)
        return max(MIN_DEFAULT_DAMPING, self.max_default * math.pow(share, 1.5))


class EigenvalueCorrected(FisherMethod):
    """A method whose curvature is diagonal in eigenvectors of second moments, with the eigenvalues that the data have along them."""

    axes: Literal["examples", "positions"] = Field(
        default="examples",
        description="Whose second moments the eigenvectors are of: of the sides of each example's gradient (as in Shampoo), or of a layer's inputs and "
        "output gradients, position by position (as in K-FAC). Embeddings have the latter.",
    )
    # More would be slow: an eigendecomposition takes a third of a second at this size, and eight times as long at twice of it.
    whole_layers: int = Field(
        default=1280,
        ge=0,
        le=4096,
        description="Layers of up to so many parameters, and of no more than there are training examples, have the eigenvectors of their whole Fisher "
        "matrix in place of Kronecker products (docs/decisions/0020-whole-layers.md). 0: no layer has.",
    )


class EkfacMethod(EigenvalueCorrected):
    """Influence functions with eigenvalue-corrected Kronecker-factored curvature (true Fisher)."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "George et al. 2018; Grosse et al. 2023, Studying LLM Generalization with Influence Functions"
    )
    type: Literal["ekfac"]

    @property
    def passes(self) -> tuple[str, ...]:
        """Passes of every member of the ensemble over the training set that a fit takes, in order."""
        return ("covariance", "eigenvalues", "features")


class KfacMethod(FisherMethod):
    """Influence functions with Kronecker-factored curvature, without the eigenvalue correction."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Martens & Grosse 2015, Optimizing Neural Networks with Kronecker-factored Approximate Curvature"
    )
    type: Literal["kfac"]

    @property
    def passes(self) -> tuple[str, ...]:
        """Passes of every member of the ensemble over the training set that a fit takes, in order."""
        return ("covariance", "features")


class DiagonalMethod(FisherMethod):
    """Influence functions with the Fisher matrix's diagonal."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = "Becker & LeCun 1988; Kirkpatrick et al. 2017"
    type: Literal["diagonal"]

    @property
    def passes(self) -> tuple[str, ...]:
        """Passes of every member of the ensemble over the training set that a fit takes, in order."""
        return ("eigenvalues", "features")


class GaussNewtonMethod(EigenvalueCorrected):
    """Influence functions with the true Gauss-Newton matrix shrunk towards EK-FAC: what matters of it factorised by the fit, else by iterations."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = "Teso et al. 2021; Bae et al. 2022; Wang et al. 2025 (ASTRA)"
    type: Literal["gauss_newton"]
    max_default: ClassVar[float] = 10.0
    shrinkage: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Weight ρ of EK-FAC in the curvature `(1 - ρ) Gauss-Newton + ρ EK-FAC` that is solved; 0 is the Gauss-Newton matrix itself. "
        "If null, it is 0.8; with perturbed copies, unless labels are sampled, 0.5 at twice the default damping.",
    )
    negligible: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Of pseudo-gradients with less than this times the average part of the curvature's trace only the diagonal is kept: an example "
        "that the model is sure of has hardly any curvature. Never more than that part of the trace is left out.",
    )
    iterations: int = Field(
        default=20,
        ge=1,
        le=1000,
        description="Conjugate gradient steps at most, where no factorisation answers: with more pseudo-gradients left than the fit factorises "
        "(4,096 at most), at another damping than the index's own, or without a group.",
    )
    tolerance: float = Field(default=1e-2, gt=0, lt=1, description="Relative residual at which such a solve stops.")
    curvature_examples: int | None = Field(
        default=None,
        ge=1,
        description="Training examples whose curvature is used, evenly spread; as many as fit 1 GiB by default.",
    )

    @property
    def passes(self) -> tuple[str, ...]:
        """Passes of every member of the ensemble over the training set that a fit takes, in order."""
        return ("covariance", "eigenvalues", "features")


class DataInfMethod(PerturbedMethodBase):
    """Influence functions with each layer's empirical Fisher, the inverse of a mean replaced by the mean of inverses."""

    self_influence: ClassVar[bool] = False
    reference: ClassVar[str] = "Kwon et al. 2024, DataInf"
    type: Literal["datainf"]
    damping: Damping = Field(default=0.1, description=LAYER_DAMPING)
    curvature_examples: int | None = Field(
        default=None,
        ge=1,
        description="Training examples whose curvature is used, evenly spread; as many as fit 1 GiB by default.",
    )
