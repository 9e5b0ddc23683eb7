"""Data sets as clients see them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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
    "job": "job_01k9m3v5x8ns2d8vqyt5b9w4h0",
    "error": None,
    "created_at": "2026-11-24T10:00:00Z",
}


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
