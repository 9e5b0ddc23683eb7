"""Imported data sets."""

from typing import Any

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Created


class Dataset(Created, Base):
    """A data set and where its files are. A later version holds its parent's rows, then its own."""

    __tablename__ = "dataset"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("dataset.id"), index=True)
    version: Mapped[int] = mapped_column(server_default="1")
    status: Mapped[str]
    spec: Mapped[dict[str, Any]]
    sha256: Mapped[str | None]
    num_examples: Mapped[int | None]
    num_classes: Mapped[int | None]
    target_type: Mapped[str | None]
    input_shape: Mapped[list[Any] | None]
    columns: Mapped[list[Any] | None]
    bytes: Mapped[int | None]
    artifact: Mapped[str | None]
    upload: Mapped[str | None]
    job_id: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]


class DeletedExample(Created, Base):
    """A row that is gone from every answer, kept with the version that brought it; later versions inherit it."""

    __tablename__ = "deleted_example"

    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id", ondelete="CASCADE"), primary_key=True)
    row: Mapped[int] = mapped_column(primary_key=True)
