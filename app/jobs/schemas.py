"""Jobs as clients see them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

JobState = Literal["queued", "running", "succeeded", "failed", "cancelling", "cancelled"]
JobKind = Literal["import", "fit", "extension", "refresh", "training", "evaluation", "verification", "unlearning"]
TERMINAL: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")

JOB_EXAMPLE: dict[str, Any] = {
    "id": "job_01k9m3v5x8ns2d8vqyt5b9w4hz",
    "kind": "fit",
    "state": "running",
    "resource_type": "index",
    "resource_id": "idx_01k9m3v5x7f2c9e1pqyt5b9w4h",
    "attempt": 1,
    "progress": {"done": 6144, "total": 12000, "unit": "examples", "rate": 1410.5, "eta_seconds": 4.2},
    "error": None,
    "created_at": "2026-11-24T10:00:00Z",
    "started_at": "2026-11-24T10:00:00.2Z",
    "finished_at": None,
}


class JobProgress(BaseModel):
    """How far a job is."""

    done: int
    total: int | None
    unit: str
    rate: float | None = Field(description="Units per second, lately.")
    eta_seconds: float | None


class JobOut(BaseModel):
    """A job."""

    model_config = ConfigDict(json_schema_extra={"examples": [JOB_EXAMPLE]})

    id: str
    kind: JobKind
    state: JobState
    resource_type: str
    resource_id: str = Field(description="What the job makes.")
    attempt: int = Field(description="How often it was started.")
    progress: JobProgress
    error: dict[str, Any] | None = Field(description="The problem that ended it, as a problem document.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobEventOut(BaseModel):
    """An event of a job's stream."""

    type: str
    data: dict[str, Any]
