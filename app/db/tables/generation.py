"""Generations of indexes: what each was, or is being, made from."""

from typing import Any

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Created


class IndexGeneration(Created, Base):
    """One generation of an index: the one that answers, the one before it, or the one being made.

    `left_out` are the deleted rows it was made without. `base` names the fit that it extends, null where it is a fit of its own.
    """

    __tablename__ = "index_generation"

    index_id: Mapped[str] = mapped_column(ForeignKey("attribution_index.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), index=True)
    left_out: Mapped[list[Any]]
    base: Mapped[dict[str, Any] | None]
    fingerprint: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(index=True)
