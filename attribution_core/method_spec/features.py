"""Inner products of rows that the index keeps: projected or whole gradients, and representations."""

from typing import ClassVar, Literal

from pydantic import Field

from attribution_core.method_spec.base import (
    LAYER_DAMPING,
    Damping,
    GroupEstimator,
    MethodBase,
    Notion,
    PerturbedMethodBase,
    ProjectionSpec,
    TemperedMethodBase,
)


class LograMethod(PerturbedMethodBase):
    """Influence functions in a space where each layer's input and output gradient were projected apart, with that space's Fisher matrix."""

    extends: ClassVar[bool] = True
    exact_rows: ClassVar[bool] = True
    reference: ClassVar[str] = "Choe et al. 2024, What is Your Data Worth to GPT?"
    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive", "newton")
    type: Literal["logra"]
    projection: ProjectionSpec = ProjectionSpec(type="factored")
    damping: Damping = Field(default=0.3, description=LAYER_DAMPING)


class TrakMethod(TemperedMethodBase):
    """TRAK: the linearised model's one-step update, in a random projection, averaged over checkpoints."""

    extends: ClassVar[bool] = True
    exact_rows: ClassVar[bool] = True
    reference: ClassVar[str] = "Park et al. 2023, TRAK: Attributing Model Behavior at Scale"
    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive", "newton")
    type: Literal["trak"]
    damping: Damping = Field(default=3.0, description="Default damping, as a multiple of the mean eigenvalue.")
    curvature: Literal["gradient", "gauss_newton", "fisher"] = Field(
        default="gauss_newton",
        description="`gradient`: the published kernel, whose scores have an arbitrary scale. `gauss_newton`: each row "
        "weighted by p(1-p), which puts scores in units of the measurement. `fisher`: the Gauss-Newton matrix of all "
        "classes (or sampled tokens), projected.",
    )
    soft_threshold: float | None = Field(
        default=None, ge=0, le=1e12, description="Shrink scores towards 0 by this much, as published; off by default."
    )

    @property
    def passes(self) -> tuple[str, ...]:
        """Passes of every member of the ensemble over the training set that a fit takes, in order."""
        return ("kernel", "features") if self.curvature == "fisher" else ("features",)

    @property
    def default_residual_power(self) -> float:
        """The published kernel has the published residuals."""
        return 1.0 if self.curvature == "gradient" else super().default_residual_power


class GradDotMethod(PerturbedMethodBase):
    """Inner product of the query's and the training example's gradients (one-checkpoint TracIn, identity curvature)."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = "Pruthi et al. 2020, Estimating Training Data Influence by Tracing Gradient Descent"
    type: Literal["grad_dot"]


class GradCosMethod(PerturbedMethodBase):
    """Cosine of the query's and the training example's gradients."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = "Hammoudeh & Lowd 2022, Identifying a Training-Set Attack's Target"
    type: Literal["grad_cos"]


class RepresentationMethod(MethodBase):
    """Similarity of penultimate representations: evidence, not causation."""

    notion: ClassVar[Notion] = "corroborative"
    extends: ClassVar[bool] = True
    exact_rows: ClassVar[bool] = True
    reference: ClassVar[str] = "Hanawa et al. 2021, Evaluation of Similarity-based Explanations"
    type: Literal["representation"]
    similarity: Literal["cosine", "dot"] = "cosine"


class RepresenterMethod(MethodBase):
    """Representer points: what each training example adds to the outputs, where the last linear layer is at its optimum under a penalty."""

    exact_rows: ClassVar[bool] = True
    reference: ClassVar[str] = "Yeh et al. 2018, Representer Point Selection for Explaining Deep Neural Networks"
    type: Literal["representer"]
    l2: float = Field(
        default=0.01,
        gt=0,
        le=1e12,
        description="The last layer's penalty: the mean loss + l2/2 · ‖Θ‖² over its weight and bias; the paper's λ is half of it.",
    )
    optimum: Literal["refit", "require"] = Field(
        default="refit",
        description="What to do with a last layer that is not at its optimum, as hardly any is: explain the one that Newton steps lead to, "
        "as the paper does, or refuse it. The index tells how far it was, under `coverage.head`.",
    )

    @property
    def passes(self) -> tuple[str, ...]:
        """Passes of every member of the ensemble over the training set that a fit takes, in order."""
        return ("head", "features")
