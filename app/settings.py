"""Every setting of the service: one place, environment variables with the prefix `HEADWATER_`, `__` between levels."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class DatabaseSettings(BaseModel):
    """Where metadata is kept."""

    url: str | None = Field(
        default=None, description="SQLAlchemy URL of a Postgres ≥ 15; an embedded server in the data folder by default."
    )
    password: SecretStr | None = Field(default=None, description="Password, if the URL holds none.")
    password_file: Path | None = Field(default=None, description="File that holds the password.")
    pool_size: int = Field(default=10, ge=1, le=200, description="Connections a process keeps.")
    statement_timeout_ms: int = Field(default=15_000, ge=100, description="Longest statement of a request.")


class EngineSettings(BaseModel):
    """The process that answers queries."""

    queue_limit: int = Field(default=64, ge=1, le=10_000, description="Queries waiting at most; more are answered 429.")
    timeout_seconds: float = Field(default=60, gt=0, description="Longest a query may take, waiting included.")
    memory_bytes: int = Field(
        default=4 << 30, ge=1 << 20, description="Loaded indexes kept warm, by their estimated size."
    )
    threads: int | None = Field(default=None, ge=1, description="Torch threads; all cores by default.")
    device: str = Field(default="auto", description="`auto`, `cpu` or `cuda`.")


class WorkerSettings(BaseModel):
    """The process that runs jobs."""

    lease_seconds: float = Field(
        default=30, ge=1, description="After this long without a sign, a worker's work is taken over."
    )
    max_attempts: int = Field(
        default=5, ge=1, le=1000, description="Times a piece of work is tried before its job fails."
    )
    keep_failed_hours: float = Field(
        default=72,
        ge=0,
        description="For so long a failed or cancelled job's finished shards are kept; a retry after that starts from the beginning.",
    )
    shard_size: int = Field(default=512, ge=1, le=1_000_000, description="Training examples per shard of a fit.")
    threads: int | None = Field(default=None, ge=1, description="Torch threads; all cores by default.")
    device: str = Field(default="auto", description="`auto`, `cpu` or `cuda`.")


class LimitSettings(BaseModel):
    """What one request may ask for."""

    max_queries: int = Field(default=32, ge=1, le=10_000, description="Query examples per request.")
    max_subsets: int = Field(default=64, ge=1, le=10_000, description="Counterfactual subsets per request.")
    max_top_k: int = Field(default=1000, ge=1, le=100_000, description="Largest `top_k`.")
    max_replay_hours: float = Field(
        default=24, gt=0, description="Longest estimated retraining of one request, in hours."
    )
    rescore_rows: int = Field(default=200_000, ge=1, description="Larger groups are summed from stored features.")


class Settings(BaseSettings):
    """The service's configuration."""

    model_config = SettingsConfigDict(
        env_prefix="HEADWATER_", env_nested_delimiter="__", env_file=".env", extra="ignore"
    )

    data_dir: Path = Field(default=Path("data"), description="Everything the service keeps.")
    roots: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")], Path] = Field(
        default_factory=dict, description='Folders that requests may import from, as JSON: {"name": "/path"}.'
    )
    allowed_hosts: list[str] = Field(
        default=["localhost", "127.0.0.1", "[::1]", "::1", "testserver"],
        description="Host headers that are answered, as JSON.",
    )
    max_body_bytes: int = Field(default=8 << 20, ge=1024, description="Largest JSON body.")
    max_upload_bytes: int = Field(default=4 << 30, ge=1024, description="Largest upload.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "console"] = "console"
    database: DatabaseSettings = DatabaseSettings()
    engine: EngineSettings = EngineSettings()
    worker: WorkerSettings = WorkerSettings()
    limits: LimitSettings = LimitSettings()
