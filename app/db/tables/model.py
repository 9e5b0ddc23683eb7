"""Models and their checkpoints."""

from typing import Any

from sqlalchemy import ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Created


class Model(Created, Base):
    """An architecture with a task; `parameters` is the skeleton that checkpoints must fit."""

    __tablename__ = "model"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    architecture: Mapped[dict[str, Any]]
    task: Mapped[dict[str, Any]]
    tokenizer: Mapped[dict[str, Any] | None]
    recipe: Mapped[dict[str, Any] | None]
    user_metadata: Mapped[dict[str, Any] | None]
    parameters: Mapped[dict[str, Any]]
    num_parameters: Mapped[int]


class Checkpoint(Created, Base):
    """Weights of a model at a step of a run; `source` says whether they were uploaded, trained or unlearned."""

    __tablename__ = "checkpoint"
    __table_args__ = (UniqueConstraint("model_id", "run", "step"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("model.id", ondelete="CASCADE"))
    run: Mapped[str]
    step: Mapped[int]
    epoch: Mapped[float | None]
    learning_rate: Mapped[float | None]
    seed: Mapped[int | None]
    final: Mapped[bool]
    sha256: Mapped[str]
    bytes: Mapped[int]
    dtype: Mapped[str]
    artifact: Mapped[str]
    source: Mapped[str]
