"""Models and checkpoints as clients send and see them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from attribution_core.spec import ArchitectureSpec, Name, Spec, TaskSpec, TokenizerSpec
from attribution_core.training.recipe import Recipe

CheckpointSource = Literal["uploaded", "trained", "unlearned"]
MODEL_EXAMPLE: dict[str, Any] = {
    "name": "digit-cnn",
    "architecture": {"name": "cnn", "arguments": {"input_shape": [1, 28, 28], "channels": [8, 16], "num_classes": 10}},
    "task": {"type": "classification"},
}


class ModelCreate(Spec):
    """A model to register."""

    model_config = ConfigDict(json_schema_extra={"examples": [MODEL_EXAMPLE]})

    name: Name
    architecture: ArchitectureSpec
    task: TaskSpec
    tokenizer: TokenizerSpec | None = Field(default=None, description="Needed for text.")
    recipe: Recipe | None = Field(default=None, description="How it is trained, exactly enough to train it again.")
    metadata: dict[str, Any] | None = Field(default=None, description="Anything of yours.")


class ModelOut(BaseModel):
    """A registered model."""

    id: str
    name: str
    architecture: dict[str, Any]
    task: dict[str, Any]
    tokenizer: dict[str, Any] | None
    recipe: dict[str, Any] | None
    metadata: dict[str, Any] | None
    parameters: dict[str, Any] = Field(description="Names and shapes that a checkpoint must have.")
    num_parameters: int
    created_at: datetime


class CheckpointMeta(Spec):
    """Where in training a checkpoint was taken."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"run": "seed-0", "step": 504, "seed": 0, "final": True}]}
    )

    run: Name = Field(description="Checkpoints of one training share it; several runs are an ensemble.")
    step: int = Field(ge=0, le=2**53, description="Optimizer steps before it.")
    epoch: float | None = Field(default=None, ge=0)
    learning_rate: float | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=0, le=2**53)
    final: bool = Field(default=True, description="The end of its run.")


class CheckpointOut(BaseModel):
    """A checkpoint."""

    id: str
    model: str
    run: str
    step: int
    epoch: float | None
    learning_rate: float | None
    seed: int | None
    final: bool
    sha256: str
    bytes: int
    dtype: str
    source: CheckpointSource = Field(
        description="`uploaded`, `trained` from the recipe, or `unlearned`: made from another one without a forget set."
    )
    created_at: datetime


class ArchitectureOut(BaseModel):
    """An architecture that models can have."""

    name: str
    description: str
    arguments: dict[str, Any] = Field(description="JSON Schema of its arguments.")
    kinds: list[str] = Field(description="Kinds of data sets it reads.")
    tasks: list[str]
    extra: str | None = Field(description="Extra of the distribution that it needs.")


class Architectures(BaseModel):
    """All of them."""

    items: list[ArchitectureOut]
