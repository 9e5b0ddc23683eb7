"""Trainings, evaluations, verifications and banks as clients send and see them."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from app.queries.schemas import Interval, Queries, QueryOut, Reference, Subset
from attribution_core.evaluate.spec import LooSpec, RemovalSpec, TuneSpec
from attribution_core.method_spec import Damping
from attribution_core.spec import ColumnName, Filter, Row, Seed, Selector, Spec, all_different, check_filter_size
from attribution_core.training.spec import Protocol, Semantics
from attribution_core.unlearning.spec import FineTune, GradientAscent, Newton, UnlearningMethod

Seeds = Annotated[list[Seed], Field(min_length=1, max_length=256), AfterValidator(all_different)]
Hours = Annotated[float, Field(gt=0, le=10_000)]
RunPrefix = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,47}$")]

_ROWS: dict[str, Any] = {"dataset": "mnist-test", "rows": [7]}
_TRAINING: dict[str, Any] = {"dataset": "mnist-train", "seeds": [0, 1, 2], "run": "seed"}
_PROTOCOL: dict[str, Any] = {"alpha": 0.5, "subsets": 50, "seeds": 1}
_EVALUATION: dict[str, Any] = {"queries": {"dataset": "mnist-test", "count": 100}, "protocol": _PROTOCOL, "tune": True}
_VERIFICATION: dict[str, Any] = {
    "queries": [_ROWS],
    "subsets": [{"remove": {"top_positive": 50}}, {"remove": {"rows": [1, 2, 3]}}],
    "seeds": [0, 1, 2],
}

_UNLEARNED: dict[str, Any] = {
    "forget": {"where": {"field": "source", "op": "eq", "value": "vendor-4"}},
    "method": {"type": "newton"},
    "check": {"oracles": 8, "test": {"dataset": "mnist-test"}},
}


class TrainingCreate(Spec):
    """Train a model from its recipe."""

    model_config = ConfigDict(json_schema_extra={"examples": [_TRAINING]})

    dataset: Reference = Field(description="The training set; id or name.")
    seeds: Seeds = Field(default=[0], description="One training each: initialisation, order and augmentation.")
    save_every: int | None = Field(
        default=None, ge=1, description="Keep a checkpoint every so many steps; only the last by default."
    )
    run: RunPrefix = Field(default="seed", description="Checkpoints get the run `<run>-<seed>`.")
    max_hours: Hours | None = Field(default=None, description="Refuse if it is estimated to take longer.")

    def run_names(self) -> list[str]:
        """Return the run of every seed's checkpoints."""
        return [f"{self.run}-{seed}" for seed in self.seeds]


class TrainedRun(BaseModel):
    """What one seed's training gave."""

    seed: int
    run: str
    checkpoints: list[str]
    diverged: bool = Field(description="Its weights stopped being finite; it has no checkpoints.")


class ReplayOut(BaseModel):
    """What every replay says about itself."""

    id: str
    status: Literal["running", "succeeded", "failed"]
    job: str | None
    error: dict[str, Any] | None
    created_at: datetime


class TrainingOut(ReplayOut):
    """A training from a recipe."""

    model: str
    dataset: str | None
    seeds: list[int]
    save_every: int | None
    runs: list[TrainedRun] | None = Field(description="Null until it has finished.")


class QuerySet(Spec):
    """Examples of a data set that an evaluation asks about."""

    dataset: Reference
    rows: Annotated[list[Row], Field(min_length=1, max_length=10_000)] | None = None
    count: int = Field(default=100, ge=2, le=10_000, description="Evenly spread examples, where no rows are named.")


def _kind_of_tune(value: object) -> str:
    return "choice" if isinstance(value, bool) else "candidates"


# Judged as the one or the other, so that a wrong object is not told to be no truth value as well.
Tune = Annotated[Annotated[TuneSpec, Tag("candidates")] | Annotated[bool, Tag("choice")], Discriminator(_kind_of_tune)]


class EvaluationCreate(Spec):
    """Measure an index against real retraining."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EVALUATION]})

    queries: QuerySet
    protocol: Protocol = Field(
        default=Protocol(subsets=50, seed=1),
        description="The bank of retrainings; what exists of it is used again. Not the one that the index learnt from, if it did.",
    )
    deterministic: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], AfterValidator(all_different)] = Field(
        default_factory=list,
        max_length=4,
        description="Shares kept, such as 0.99 and 0.95, for the LDS of one seed: same batches, left-out examples weigh zero.",
    )
    loo: LooSpec | None = Field(default=None, description="Leave single examples out and retrain.")
    removal: RemovalSpec | None = Field(default=None, description="Leave the top examples out and retrain.")
    mislabelled: Filter | None = Field(
        default=None, description="Training examples known to be mislabelled: how well self-influence finds them."
    )
    source: ColumnName | None = Field(
        default=None,
        description="Metadata column, in both data sets, of where an example is from: queries must not draw from elsewhere.",
    )
    tune: Tune = Field(
        default=False, description="Choose the damping by LDS on one half of the bank; both halves are reported."
    )
    max_hours: Hours | None = Field(default=None, description="Refuse if the retrainings are estimated to take longer.")

    @model_validator(mode="after")
    def _small(self) -> Self:
        if self.mislabelled is not None:
            check_filter_size(self.mislabelled)
        if self.protocol.subsets < 4:
            raise ValueError("an evaluation needs at least 4 subsets")
        return self


class EvaluationOut(ReplayOut):
    """An evaluation of an index."""

    index: str
    request: dict[str, Any]
    quality: dict[str, Any] | None = Field(description="What was measured; null until it has finished.")


class VerificationCreate(Spec):
    """Retrain without chosen examples, and lay the predictions beside it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_VERIFICATION]})

    queries: Queries
    subsets: Annotated[list[Subset], Field(min_length=1, max_length=64)]
    seeds: Seeds = Field(default=[0, 1, 2], description="Retrainings per subset, and on everything.")
    semantics: Semantics = "resample"
    damping: Damping | None = None
    interval: Interval | None = 0.9
    max_hours: Hours | None = None


class VerifiedPrediction(BaseModel):
    """One prediction beside what retraining gave; changes are from training on everything with the same seeds."""

    subset: int
    removed: int
    predicted_change: float
    interval: list[float] | None
    calibrated: bool
    realised_change: float | None = Field(description="Mean over the seeds; null if every retraining diverged.")
    seed_noise: float | None = Field(description="Standard error of that mean over the seeds; null for one seed.")
    realised_by_seed: list[float | None]


class VerificationResult(BaseModel):
    """One query's verified predictions."""

    query: QueryOut
    output: dict[str, Any]
    predictions: list[VerifiedPrediction]


class VerificationOut(ReplayOut):
    """A verification of an index's predictions."""

    index: str
    request: dict[str, Any]
    retrainings: int | None
    diverged: int | None
    results: list[VerificationResult] | None


class UnlearningCheck(Spec):
    """Compare what is unlearned with models that were retrained without the forget set."""

    oracles: int = Field(default=8, ge=2, le=256, description="Retrainings without the forget set, one seed each.")
    test: QuerySet | None = Field(default=None, description="Examples that were not trained on, to look at too.")
    baselines: Annotated[list[UnlearningMethod], Field(max_length=8), AfterValidator(all_different)] = Field(
        default=[GradientAscent(type="gradient_ascent"), FineTune(type="fine_tune")],
        description="Other methods that are judged beside the one that is asked for; doing nothing always is.",
    )
    semantics: Semantics = "resample"


class UnlearnedCreate(Spec):
    """Make new checkpoints without a forget set."""

    model_config = ConfigDict(json_schema_extra={"examples": [_UNLEARNED]})

    forget: Selector
    method: UnlearningMethod = Field(default=Newton(type="newton"))
    run: RunPrefix = Field(
        default="unlearned", description="The new checkpoints get the run `<run>-<run of the checkpoint before>`."
    )
    check: UnlearningCheck | None = Field(default=None, description="Needs a recipe.")
    max_hours: Hours | None = None

    @model_validator(mode="after")
    def _same_for_all(self) -> Self:
        if self.forget.top_positive is not None or self.forget.top_negative is not None:
            raise ValueError("a forget set is named by rows, ids or where")
        return self


class UnlearnedCheckpoint(BaseModel):
    """A checkpoint without the forget set."""

    checkpoint: str
    source: str = Field(description="The checkpoint it was made from.")
    report: dict[str, float]


class UnlearnedOut(ReplayOut):
    """What an unlearning made."""

    index: str
    request: dict[str, Any]
    forget_size: int
    checkpoints: list[UnlearnedCheckpoint] | None
    comparison: dict[str, Any] | None = Field(
        description="KLoM and accuracy gaps on forget, retain and test sets, against retrained oracles; null if not asked for."
    )
