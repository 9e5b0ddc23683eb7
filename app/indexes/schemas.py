"""Indexes and methods as clients send and see them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from attribution_core.auto import Choice
from attribution_core.method_spec import AutoMethod, MethodSpec
from attribution_core.spec import Name, Precision, SearchSpec, Spec, StoreSpec

Reference = Annotated[str, StringConstraints(min_length=1, max_length=64)]
INDEX_REQUEST: dict[str, Any] = {
    "name": "demo-ekfac",
    "model": "digit-cnn",
    "dataset": "mnist-train",
    "checkpoints": "final",
    "method": {"type": "ekfac"},
    "measurement": "margin",
}


class IndexCreate(Spec):
    """An index to fit."""

    model_config = ConfigDict(json_schema_extra={"examples": [INDEX_REQUEST]})

    name: Name
    model: Reference = Field(description="Id or name.")
    dataset: Reference = Field(description="The training set; id or name.")
    checkpoints: Literal["final", "all"] | Annotated[list[Reference], Field(min_length=1, max_length=256)] = Field(
        default="final",
        description="Scores are averaged over them, or follow each run through them; ignored by methods that train by the recipe. `final` and "
        "`all` are of those uploaded and trained; unlearned ones are named by their ids.",
    )
    method: Annotated[MethodSpec | AutoMethod, Field(discriminator="type")]
    measurement: str | None = Field(
        default=None, max_length=64, description="By the task if null, `margin` for classification."
    )
    layers: (
        Annotated[list[Annotated[str, StringConstraints(max_length=256)]], Field(min_length=1, max_length=10_000)]
        | None
    ) = Field(
        default=None,
        description="Layers to attribute, all by default: names, or patterns with `*`, `?` and `[…]`. One that starts with `!` leaves "
        "layers out.",
    )
    precision: Precision = Field(
        default="float32",
        description="Of forward and backward passes. `bfloat16` halves their memory and, on processors that know it, their time; gradients "
        "are kept and compared in float32.",
    )
    store: StoreSpec = StoreSpec()
    search: SearchSpec = SearchSpec()


class ExtensionCreate(Spec):
    """A later version to extend an index to."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"dataset": "mnist-train.v2"}]})

    dataset: Reference = Field(description="A later version of the index's data set; id or name.")


class Drift(BaseModel):
    """How far the kept factors are from what the examples say that were appended since they were fitted."""

    value: float = Field(
        description="Relative Frobenius distance of the curvatures along kept eigenvectors; 0 is none."
    )
    layers: dict[str, float]


class Pending(BaseModel):
    """A generation that is being made, or was not made."""

    generation: int
    kind: Literal["extension", "refresh"]
    status: Literal["building", "failed"]
    dataset: str
    job: str
    error: dict[str, Any] | None


class IndexOut(BaseModel):
    """An index."""

    id: str
    name: str
    status: Literal["fitting", "ready", "failed"]
    model: str
    dataset: str
    checkpoints: list[str]
    method: dict[str, Any] = Field(description="With `auto`, the one it came to.")
    choice: Choice | None = Field(description="How `auto` came to the method; null where one was named.")
    notion: str
    measurement: str
    layers: list[str] | None
    precision: Precision
    store: dict[str, Any]
    search: dict[str, Any]
    fingerprint: str = Field(
        description="Hash of weights, architecture, data, layers, method, projection, dtype and precision."
    )
    generation: int = Field(description="Counts extensions and refreshes; answers are those of exactly one.")
    training_examples: int | None = Field(
        description="The n of which each example has its share: deleted ones left out."
    )
    drift: Drift | None = Field(description="Null where every factor was fitted for this generation.")
    pending: Pending | None = Field(description="The next generation; the present one answers until it is whole.")
    coverage: dict[str, Any] | None = Field(
        description="Percentage of parameters attributed; layers covered and skipped. Where training was replayed, `replay`: its "
        "metasmoothness in [-1, 1], and the rank correlation over masked retrainings of the derivative at best (`ceiling`, by finite "
        "differences) and of the scores (`lds`)."
    )
    bytes: int | None
    dim: int | None = Field(description="Numbers stored per training example.")
    recall: float | None = Field(
        description="Share of the exact top 10 of both signs that the first search stage finds."
    )
    timings: dict[str, float] | None = Field(description="Seconds per stage.")
    quality: dict[str, Any] | None = Field(
        description="What was measured against real retraining; null if nothing was."
    )
    job: str | None
    error: dict[str, Any] | None
    created_at: datetime


class QualityOut(BaseModel):
    """What was measured for an index."""

    index: str
    quality: dict[str, Any] | None = Field(
        description="Null until an evaluation has measured it against real retraining."
    )


class MethodOut(BaseModel):
    """A method."""

    type: str
    description: str
    notion: Literal["predictive", "corroborative", "game_theoretic"]
    needs: list[str]
    query_cost: Literal["inline", "job"]
    estimators: list[str] = Field(
        description="Of the effect of groups: `additive`, and `newton` where a method has it."
    )
    self_influence: bool = Field(description="Whether its indexes tell how training examples influence themselves.")
    extends: bool = Field(description="Whether a fitted index can take appended examples with its factors kept.")
    reference: str
    parameters: dict[str, Any] = Field(description="JSON Schema.")


class Methods(BaseModel):
    """All of them."""

    items: list[MethodOut]
