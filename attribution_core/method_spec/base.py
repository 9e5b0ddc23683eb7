"""What every method says of itself, and what several ask for."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from attribution_core.spec import Seed, Spec

# Part of every fingerprint: stored features depend on how projections are generated.
PROJECTION_VERSION = 1
Notion = Literal["predictive", "corroborative", "game_theoretic"]
GroupEstimator = Literal["additive", "newton"]
Damping = Annotated[float, Field(ge=0, le=1e12)]
LAYER_DAMPING = "Default damping, as a multiple of each layer's mean eigenvalue."


# Powers of 1 - p by which examples count, where none is named (docs/decisions/0023-tempered-residuals.md).
DEFAULT_RESIDUAL_POWER = 0.6
RESIDUAL_POWER_OF_COPIES = 0.8
# Numbers per row where a projection names none.
DEFAULT_DIM = 1024
DEFAULT_BITS = 16_384


class ProjectionSpec(Spec):
    """A seeded random projection of gradients."""

    type: Literal["sjlt", "rademacher", "gaussian", "factored"] = Field(
        default="sjlt",
        description="`factored` projects each layer's input and output gradient apart, so that no gradient is ever formed.",
    )
    dim: int | None = Field(
        default=None,
        ge=8,
        le=65_536,
        description="Numbers kept per example and checkpoint; by default 16,384 where each is one bit and rows are searched exhaustively, else 1,024.",
    )
    seed: Seed = 0


class MethodBase(Spec):
    """What every method says about itself."""

    notion: ClassVar[Notion] = "predictive"
    needs: ClassVar[tuple[str, ...]] = ("checkpoints",)
    query_cost: ClassVar[Literal["inline", "job"]] = "inline"
    extends: ClassVar[bool] = False  # whether a fitted index can take more rows with its factors kept
    exact_rows: ClassVar[bool] = False  # whether stored rows are the method's own definition, so nothing is re-scored
    reference: ClassVar[str] = ""
    # How the effect of a group of training examples can be told: as the sum of their scores, or with the curvature they leave.
    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive",)
    checkpoint_needs: ClassVar[tuple[str, ...]] = ()
    # Whether it tells how each training example influences itself: not where that takes a pass over the training set for each.
    self_influence: ClassVar[bool] = True
    # What an index of it holds: a row per training example, a score per training example and named query, or what it learnt from a bank.
    keeps: ClassVar[Literal["features", "scores", "bank"]] = "features"

    @property
    def damped(self) -> bool:
        """Whether its scores depend on a damping that a query may name."""
        return "damping" in type(self).model_fields

    @property
    def follows_training(self) -> bool:
        """Whether checkpoints are moments of trainings rather than an ensemble."""
        return bool(self.checkpoint_needs)

    @property
    def passes(self) -> tuple[str, ...]:
        """Passes of every member of the ensemble over the training set that a fit takes, in order."""
        return ("features",)

    @property
    def stages(self) -> tuple[str, ...]:
        """Parts of a fit, in order."""
        return self.passes

    @property
    def copies(self) -> int:
        """Perturbed copies of each checkpoint, which are members of the ensemble as it is."""
        return 0

    @property
    def trains_copies(self) -> bool:
        """Whether the copies are trained, once, before any pass."""
        return False


class GradientMethodBase(MethodBase):
    """A method whose scores are inner products of gradients."""

    projection: ProjectionSpec = ProjectionSpec()


class CopyTraining(Spec):
    """A short training of every copy on the training set: from enough noise, another network that has learnt the same data."""

    epochs: int = Field(default=4, ge=1, le=1000, description="Passes over the training set.")
    batch_size: int = Field(default=32, ge=1, le=1_000_000, description="Examples per step.")
    step: float = Field(
        default=0.02,
        gt=0,
        le=1,
        description="First learning rate, as a multiple of the root mean square of each parameter tensor, for gradients of mean square 1; it "
        "falls to 0 along a cosine.",
    )


# Noise where none is named: of copies as they are, and of those that are trained, which need to be other networks.
_NOISE = 0.5
_NOISE_OF_TRAINED = 2.0


class Perturbation(Spec):
    """Copies of each checkpoint with noise on their weights, over which scores are averaged beside it."""

    copies: int = Field(
        default=9, ge=1, le=64, description="Of each checkpoint; a fit and a query cost that many times more."
    )
    noise: float = Field(
        default=_NOISE,
        gt=0,
        le=100,
        description="Standard deviation, as a multiple of the root mean square of each parameter tensor, which a copy keeps. If it is not given, "
        f"{_NOISE}, and {_NOISE_OF_TRAINED} where copies are trained.",
    )
    training: CopyTraining | None = Field(
        default=None,
        description="Trains every copy for a little while on the training set, which ranks retrainings better than noise alone, for so many more "
        "passes of each copy over it (docs/decisions/0025-trained-copies.md). Off by default.",
    )
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _more_noise_to_train(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("training") is not None and "noise" not in given:
            return {**given, "noise": _NOISE_OF_TRAINED}
        return given


class PerturbedMethodBase(GradientMethodBase):
    """A method of gradients under checkpoints that are an ensemble, which copies of them can enlarge."""

    perturbation: Perturbation | None = Field(
        default=None,
        description="An ensemble out of each checkpoint: scores are averaged over it and copies of it with noisy weights, which ranks retrainings "
        "better for as many times the cost (docs/studies/perturbation.md). Off by default.",
    )

    @property
    def copies(self) -> int:
        """Perturbed copies of each checkpoint."""
        return 0 if self.perturbation is None else self.perturbation.copies

    @property
    def trains_copies(self) -> bool:
        """Whether the copies are trained, once, before any pass."""
        return self.perturbation is not None and self.perturbation.training is not None

    @property
    def stages(self) -> tuple[str, ...]:
        """Parts of a fit, in order."""
        return ("copies", *self.passes) if self.trains_copies else self.passes


class TemperedMethodBase(PerturbedMethodBase):
    """A method that can count classified examples by another power of their residual than the derivative of their loss does."""

    residual_power: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Power of 1 - p, the training target's, in proportion to which a classified example counts. 1 is the derivative of its loss, "
        "which of examples that were learnt by heart says how little they matter now, not how much they did. If null, it is 0.6, with "
        "perturbed copies 0.8, and 1 for models of one layer and TRAK's published kernel (docs/decisions/0023-tempered-residuals.md).",
    )

    @property
    def default_residual_power(self) -> float:
        """The power where none is named, for models of several layers: perturbed copies are less sure of what was learnt by heart as they are."""
        return RESIDUAL_POWER_OF_COPIES if self.copies else DEFAULT_RESIDUAL_POWER


class QueryRows(Spec):
    """Rows of a data set that an index is to answer for."""

    dataset: str = Field(min_length=1, max_length=128, description="Id or name.")
    rows: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=4096)
