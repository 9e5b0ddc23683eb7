"""What retraining leaves behind: banks of retrained models, and what was learnt from them."""

from typing import Any

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Created


class Bank(Created, Base):
    """Retrainings on random subsets of one data set by one recipe and protocol; all of a model's indexes share it."""

    __tablename__ = "bank"

    id: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("model.id", ondelete="CASCADE"), index=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), index=True)
    protocol: Mapped[dict[str, Any]]


class BankGroup(Created, Base):
    """Subsets of a bank that were retrained together; `artifact` holds the weights."""

    __tablename__ = "bank_group"

    bank_id: Mapped[str] = mapped_column(ForeignKey("bank.id", ondelete="CASCADE"), primary_key=True)
    ordinal: Mapped[int] = mapped_column(primary_key=True)
    artifact: Mapped[str]
    bytes: Mapped[int]
    retrainings: Mapped[int]
    diverged: Mapped[int]


class Replay(Created, Base):
    """One training, evaluation, verification or unlearning: what was asked, and what came of it.

    `left_out` are the rows of the data set that were deleted when it was asked: every attempt of its job trains without the same ones.
    """

    __tablename__ = "replay"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    model_id: Mapped[str] = mapped_column(ForeignKey("model.id", ondelete="CASCADE"), index=True)
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("dataset.id", ondelete="SET NULL"), index=True)
    index_id: Mapped[str | None] = mapped_column(ForeignKey("attribution_index.id", ondelete="CASCADE"), index=True)
    request: Mapped[dict[str, Any]]
    left_out: Mapped[list[Any]]
    status: Mapped[str]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    job_id: Mapped[str | None]
