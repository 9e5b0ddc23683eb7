"""Questions and answers."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from attribution_core.method_spec import Damping, GroupEstimator
from attribution_core.spec import Filter, Row, Selector, Spec, check_filter_size

Reference = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_ROWS: dict[str, Any] = {"dataset": "mnist-test", "rows": [7]}
_ATTRIBUTIONS: dict[str, Any] = {"queries": [_ROWS], "top_k": 10, "include": ["metadata", "preview"]}
_SUBSETS: list[Any] = [{"remove": {"rows": [1, 2, 3]}}, {"remove": {"top_positive": 50}}]
_COUNTERFACTUALS: dict[str, Any] = {"queries": [_ROWS], "subsets": _SUBSETS}
_FORGET: dict[str, Any] = {"where": {"field": "source", "op": "eq", "value": "vendor-4"}}
_ESTIMATOR: Any = Field(
    default="additive",
    description="`additive`: minus the scores of those left out. `newton`: with the curvature that they leave behind, which counts "
    "for large groups; `GET /methods` says which methods have it.",
)
_UNLEARNING: dict[str, Any] = {"forget": _FORGET, "queries": [_ROWS]}


class InlineExample(Spec):
    """An example given in the request: a base64 image, a tensor, tokens, text or a feature map, as the training set has them."""

    input: Any
    target: int | float | list[float] | None = Field(default=None, description="Needed to measure its class or error.")

    @model_validator(mode="after")
    def _has_input(self) -> Self:
        if self.input is None:
            raise ValueError("an example needs an input")
        return self


class QuerySelection(Spec):
    """Rows of a data set, or one inline example."""

    dataset: Reference | None = None
    rows: Annotated[list[Row], Field(min_length=1, max_length=10_000)] | None = None
    example: InlineExample | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.example is None) == (self.dataset is None) or (self.dataset is None) != (self.rows is None):
            raise ValueError("give either dataset and rows, or example")
        return self


Queries = Annotated[list[QuerySelection], Field(min_length=1, max_length=10_000)]


class Question(Spec):
    """What every question has."""

    queries: Queries
    damping: Damping | None = Field(
        default=None, description="Multiple of the mean eigenvalue; the method's default if null."
    )
    rescore: bool = Field(default=True, description="Score with exact gradients where stored rows are projections.")


class AttributionRequest(Question):
    """Which training examples are behind these outputs?"""

    model_config = ConfigDict(json_schema_extra={"examples": [_ATTRIBUTIONS]})

    top_k: int = Field(default=10, ge=1, le=100_000)
    filter: Filter | None = Field(default=None, description="Only training examples that it selects.")
    include: list[Literal["metadata", "preview"]] = Field(default_factory=list, max_length=2)

    @field_validator("filter")
    @classmethod
    def _small(cls, value: Filter | None) -> Filter | None:
        return None if value is None else check_filter_size(value)


class Subset(Spec):
    """A changed training set: without some examples, or with only some."""

    remove: Selector | None = None
    keep: Selector | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.remove is None) == (self.keep is None):
            raise ValueError("give exactly one of remove, keep")
        return self


Interval = Annotated[float, Field(gt=0, lt=1)]


class CounterfactualRequest(Question):
    """What would the outputs be after training on other sets?"""

    model_config = ConfigDict(json_schema_extra={"examples": [_COUNTERFACTUALS]})

    subsets: Annotated[list[Subset], Field(min_length=1, max_length=10_000)]
    estimator: GroupEstimator = _ESTIMATOR
    interval: Interval | None = Field(
        default=None, description="Coverage of the interval asked for; null where nothing calibrates it."
    )


class UnlearningRequest(Question):
    """What would the outputs be had a forget set never been trained on?"""

    model_config = ConfigDict(json_schema_extra={"examples": [_UNLEARNING]})

    forget: Selector
    estimator: GroupEstimator = _ESTIMATOR
    interval: Interval | None = None

    @model_validator(mode="after")
    def _same_for_all(self) -> Self:
        if self.forget.top_positive is not None or self.forget.top_negative is not None:
            raise ValueError("a forget set is named by rows, ids or where")
        return self


class QueryOut(BaseModel):
    """Which query a result is for."""

    dataset: str | None
    row: int | None
    id: str | None
    target: Any


class Output(BaseModel):
    """What the model outputs for a query."""

    value: float = Field(description="The measurement, mean over the index's checkpoints.")
    prediction: Any
    probability: float | None


class Attributed(BaseModel):
    """A training example behind an output."""

    row: int
    id: str
    score: float = Field(description="How much having it in training raised the measurement.")
    target: Any
    metadata: dict[str, Any] | None
    preview: str | None


class AttributionResult(BaseModel):
    """One query's top training examples."""

    query: QueryOut
    output: Output
    positive: list[Attributed]
    negative: list[Attributed]


class Answer(BaseModel):
    """What every answer says about itself."""

    index: str
    method: str
    notion: str
    measurement: str = Field(
        description="What a positive score raised. Every measurement but `loss` is higher the more the model is behind the output."
    )
    damping: float | None
    approximate: bool = Field(description="Whether scores or the search are approximations of the method's own.")
    recall: float | None = Field(
        description="Share of the exact top 10 the first search stage finds, measured at build time."
    )
    generation: int = Field(description="The index's generation that answered.")
    drift: float | None = Field(
        description="How far kept factors are from examples appended since; null where every factor is this generation's."
    )
    quality: dict[str, Any] | None = Field(description="Measured against real retraining; null if nothing was.")
    elapsed_ms: float


class AttributionAnswer(Answer):
    """Top training examples per query."""

    results: list[AttributionResult]


class Prediction(BaseModel):
    """A predicted output after training on a changed set."""

    subset: int
    removed: int = Field(description="Training examples left out.")
    predicted: float
    change: float
    interval: list[float] | None
    calibrated: bool = Field(description="Whether slope and interval were calibrated on real retrainings.")


class CounterfactualResult(BaseModel):
    """One query's predictions."""

    query: QueryOut
    output: Output
    predictions: list[Prediction]


class CounterfactualAnswer(Answer):
    """Predictions per query and subset."""

    estimator: GroupEstimator
    results: list[CounterfactualResult]


class UnlearningResult(BaseModel):
    """One query's output as if the forget set had never been there."""

    query: QueryOut
    output: Output
    predicted: float
    change: float
    interval: list[float] | None
    calibrated: bool


class SetOutput(BaseModel):
    """A group of training examples: what the model outputs for them, and would."""

    size: int = Field(description="Examples that were looked at.")
    mean_output: float
    mean_predicted: float


class UnlearningAnswer(Answer):
    """Predictions per query, and for samples of the forgotten and the kept examples themselves."""

    estimator: GroupEstimator
    forget_size: int
    results: list[UnlearningResult]
    forget_set: SetOutput
    retain_sample: SetOutput


class SelfInfluence(BaseModel):
    """A training example and its influence on itself."""

    row: int
    id: str
    score: float
    target: Any
    metadata: dict[str, Any]
    preview: str
