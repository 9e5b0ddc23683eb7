"""Imported data sets."""

from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Created


class Dataset(Created, Base):
    """A data set and where its files are."""

    __tablename__ = "dataset"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
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
