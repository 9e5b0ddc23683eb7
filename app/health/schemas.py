"""How the service is."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Alive(BaseModel):
    """The process turns."""

    status: Literal["alive"] = "alive"


class Readiness(BaseModel):
    """Whether requests can be answered, and what each part says."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"ready": True, "checks": {"database": "ok", "migrations": "ok", "storage": "ok", "engine": "ok"}}
            ]
        }
    )

    ready: bool
    checks: dict[str, str]


class Version(BaseModel):
    """What is running."""

    version: str
    api: str
