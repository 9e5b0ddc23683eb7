"""Data sets as clients see them."""

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from attribution_core.spec import DatasetFormat, Name, Selector, Spec

DatasetStatus = Literal["importing", "ready", "failed"]
DATASET_EXAMPLE: dict[str, Any] = {
    "id": "ds_01k9m3v5x8ns2d8vqyt5b9w4hz",
    "name": "mnist-train",
    "status": "ready",
    "kind": "image",
    "spec": {"name": "mnist-train", "kind": "image", "input": "image", "target": "label", "metadata": ["source"]},
    "sha256": "44402f4aaa7a3893c87048bacbede3c74d919a7c2a4613884b6f0992458e9d26",
    "num_examples": 4000,
    "num_classes": 10,
    "target_type": "class",
    "input_shape": [1, 28, 28],
    "columns": [{"name": "source", "type": "string", "role": "metadata"}],
    "bytes": 1150322,
    "version": 1,
    "parent": None,
    "deleted": 0,
    "job": "job_01k9m3v5x8ns2d8vqyt5b9w4h0",
    "error": None,
    "created_at": "2026-11-24T10:00:00Z",
}


class VersionCreate(Spec):
    """Where the new rows of a version are; their columns are the parent's."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"source": "imports:more.parquet"}]})

    name: Name | None = Field(default=None, description="`<name of the first>.v<version>` by default.")
    format: DatasetFormat | None = Field(default=None, description="By default told from the file name.")
    source: str | None = Field(
        default=None, max_length=1024, description="`root:name/path` of a file under a root the operator configured."
    )


class DeletionCreate(Spec):
    """Examples to delete."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"selector": {"rows": [7, 12]}}]})

    selector: Selector

    @model_validator(mode="after")
    def _no_query(self) -> Self:
        if self.selector.top_positive is not None or self.selector.top_negative is not None:
            raise ValueError("examples to delete are named by rows, ids or where")
        return self


class DeletionOut(BaseModel):
    """What was deleted."""

    dataset: str
    deleted: int = Field(description="Examples that this request deleted; those deleted before do not count.")
    total: int = Field(description="Deleted examples of this data set.")


class Column(BaseModel):
    """A column of the imported data."""

    name: str
    type: str
    role: Literal["id", "input", "target", "metadata"]


class DatasetOut(BaseModel):
    """A data set."""

    model_config = ConfigDict(json_schema_extra={"examples": [DATASET_EXAMPLE]})

    id: str
    name: str
    status: DatasetStatus
    kind: str
    spec: dict[str, Any]
    sha256: str | None = Field(description="Hash of the content, whatever format it came in.")
    num_examples: int | None
    num_classes: int | None
    target_type: Literal["class", "real", "vector"] | None
    input_shape: list[int] | None
    columns: list[Column] | None
    bytes: int | None
    version: int = Field(description="1, or one more than its parent's.")
    parent: str | None = Field(description="The version whose rows come first in this one, under the same numbers.")
    deleted: int = Field(description="Examples that were deleted; they are counted in `num_examples` still.")
    job: str | None
    error: dict[str, Any] | None = Field(description="Why the import failed, with the rows that have problems.")
    created_at: datetime


class ExampleOut(BaseModel):
    """One example; its input is in the preview."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "row": 812,
                    "id": "mnist-2221",
                    "target": 3,
                    "metadata": {"source": "vendor-2"},
                    "preview": "/v1/datasets/ds_01k9m3v5x8ns2d8vqyt5b9w4hz/examples/812/preview",
                }
            ]
        }
    )

    row: int
    id: str
    target: Any
    metadata: dict[str, Any]
    preview: str
