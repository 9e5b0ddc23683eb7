"""Fitted indexes."""

from typing import Any

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Created


class Index(Created, Base):
    """A method fitted to a model's checkpoints and a data set."""

    __tablename__ = "attribution_index"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("model.id"), index=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), index=True)
    # Where the queries of a method that names them are.
    queries_id: Mapped[str | None] = mapped_column(ForeignKey("dataset.id"), index=True)
    checkpoint_ids: Mapped[list[Any]]
    method: Mapped[dict[str, Any]]
    choice: Mapped[dict[str, Any] | None]
    measurement: Mapped[str]
    layers: Mapped[list[Any] | None]
    precision: Mapped[str]
    store: Mapped[dict[str, Any]]
    search: Mapped[dict[str, Any]]
    shard_size: Mapped[int]
    status: Mapped[str]
    fingerprint: Mapped[str]
    bank_id: Mapped[str | None] = mapped_column(ForeignKey("bank.id"))
    generation: Mapped[int] = mapped_column(server_default="1")
    training_examples: Mapped[int | None]
    drift: Mapped[dict[str, Any] | None]
    pending: Mapped[dict[str, Any] | None]
    artifact: Mapped[str | None]
    coverage: Mapped[dict[str, Any] | None]
    bytes: Mapped[int | None]
    dim: Mapped[int | None]
    recall: Mapped[float | None]
    timings: Mapped[dict[str, Any] | None]
    quality: Mapped[dict[str, Any] | None]
    calibration: Mapped[dict[str, Any] | None]
    job_id: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]


class IndexPrior(Base):
    """An index that another one is built on, and is therefore kept."""

    __tablename__ = "index_prior"

    index_id: Mapped[str] = mapped_column(ForeignKey("attribution_index.id", ondelete="CASCADE"), primary_key=True)
    prior_id: Mapped[str] = mapped_column(ForeignKey("attribution_index.id"), primary_key=True, index=True)
