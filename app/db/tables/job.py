"""Jobs, the shards of fits, and what happened to them. These rows are the truth; the queue only wakes workers."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Identity, Index, func
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Created


class Job(Created, Base):
    """A piece of work. `attempt` is the fencing token: an effect counts only if it is unchanged.

    `losses` counts the workers that were lost over it since a shard of it was last finished.
    """

    __tablename__ = "job"
    __table_args__ = (Index("ix_job_unfinished", "state", postgresql_where="finished_at IS NULL"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    state: Mapped[str]
    resource_type: Mapped[str]
    resource_id: Mapped[str] = mapped_column(index=True)
    attempt: Mapped[int] = mapped_column(server_default="0")
    losses: Mapped[int] = mapped_column(server_default="0")
    worker: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    progress_done: Mapped[int] = mapped_column(server_default="0")
    progress_total: Mapped[int | None]
    progress_unit: Mapped[str]
    progress_rate: Mapped[float | None]
    error: Mapped[dict[str, Any] | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class Shard(Base):
    """One shard of a fit's stage; ordinal -1 is the stage's reduction."""

    __tablename__ = "shard"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    stage: Mapped[int] = mapped_column(primary_key=True)
    ordinal: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str]
    units: Mapped[int]
    attempt: Mapped[int] = mapped_column(server_default="0")
    worker: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    sha256: Mapped[str | None]


class JobEvent(Created, Base):
    """Something that happened to a job; the id is the event's id in the stream."""

    __tablename__ = "job_event"
    __table_args__ = (Index("ix_job_event_job_id_id", "job_id", "id"),)

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
