"""Jobs, shards and events in the database. Times are the database's; a claim raises `attempt`."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, case, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import Job, JobEvent, Shard
from app.jobs.schemas import TERMINAL
from app.web.pagination import Page, newest_first

RETRY_STATES = ("failed", "cancelled")


def expired(column: Any) -> ColumnElement[bool]:
    """A lease that ran out, by the database's clock."""
    return or_(column.is_(None), column < func.clock_timestamp())


def lease(seconds: float) -> Any:
    """A lease from now."""
    return func.clock_timestamp() + timedelta(seconds=seconds)


async def get(session: AsyncSession, job_id: str, *, lock: bool = False) -> Job | None:
    """Return a job, locked until the transaction ends where asked."""
    query = select(Job).where(Job.id == job_id).execution_options(populate_existing=True)
    return (await session.execute(query.with_for_update() if lock else query)).scalar_one_or_none()


async def unfinished(session: AsyncSession, job_ids: Sequence[str]) -> str | None:
    """Return the first of some jobs that has not ended, None if all have."""
    query = select(Job.id).where(Job.id.in_(job_ids), Job.state.not_in(TERMINAL)).order_by(Job.id).limit(1)
    return (await session.execute(query)).scalar_one_or_none()


async def page(session: AsyncSession, page_: Page, state: str | None, kind: str | None) -> Sequence[Job]:
    """Return jobs, newest first."""
    query = newest_first(select(Job), Job.id, page_, "jobs")
    if state is not None:
        query = query.where(Job.state == state)
    if kind is not None:
        query = query.where(Job.kind == kind)
    return (await session.execute(query)).scalars().all()


async def oldest(session: AsyncSession) -> str | None:
    """Return the id of the first job there is; jobs are not deleted."""
    return (await session.execute(select(func.min(Job.id)))).scalar()


async def ended_before(session: AsyncSession, job_id: str, hours: float) -> bool:
    """Return whether a job ended more than so many hours ago."""
    moment = func.clock_timestamp() - timedelta(hours=hours)
    query = select(Job.id).where(Job.id == job_id, Job.finished_at < moment)
    return (await session.execute(query)).scalar() is not None


async def any_unfinished(session: AsyncSession, kinds: Sequence[str]) -> bool:
    """Return whether a job of some kinds has not ended."""
    query = select(Job.id).where(Job.kind.in_(kinds), Job.state.not_in(TERMINAL)).limit(1)
    return (await session.execute(query)).scalar() is not None


async def state_of(session: AsyncSession, job_id: str) -> str | None:
    """Return a job's state."""
    return (await session.execute(select(Job.state).where(Job.id == job_id))).scalar_one_or_none()


async def add_event(session: AsyncSession, job_id: str, kind: str, data: dict[str, Any]) -> None:
    """Add an event to a job's stream."""
    session.add(JobEvent(job_id=job_id, type=kind, data=data))
    await session.flush()


async def events_after(session: AsyncSession, job_id: str, after: int) -> Sequence[JobEvent]:
    """Return a job's events with a larger id, oldest first."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after).order_by(JobEvent.id).limit(500)
    return (await session.execute(query)).scalars().all()


async def forget_progress(session: AsyncSession, hours: float) -> None:
    """Forget how far jobs were that ended more than so many hours ago; what states they were in is kept.

    Those that ended weeks before were seen to then, and are not looked at for ever.
    """
    now = func.clock_timestamp()
    ended = Job.finished_at.between(now - timedelta(hours=hours, weeks=2), now - timedelta(hours=hours))
    old = select(Job.id).where(ended)
    await session.execute(delete(JobEvent).where(JobEvent.type == "progress", JobEvent.job_id.in_(old)))


async def claim_job(session: AsyncSession, job_id: str, worker: str, seconds: float) -> Job | None:
    """Take a job that is queued, or whose worker's lease ran out; None if there is nothing to take."""
    free = and_(
        Job.state.in_(("queued", "running", "cancelling")), or_(Job.state == "queued", expired(Job.lease_expires_at))
    )
    claimed = await session.execute(
        update(Job)
        .where(Job.id == job_id, free)
        .values(
            state=func.replace(Job.state, "queued", "running"),
            attempt=Job.attempt + 1,
            # A worker that gives a job back leaves it no lease.
            losses=Job.losses + case((Job.lease_expires_at.is_not(None), 1), else_=0),
            worker=worker,
            lease_expires_at=lease(seconds),
            started_at=func.coalesce(Job.started_at, func.clock_timestamp()),
            updated_at=func.clock_timestamp(),
        )
        .returning(Job)
        .execution_options(populate_existing=True)
    )
    return claimed.scalar_one_or_none()


async def renew_job(session: AsyncSession, job_id: str, attempt: int, seconds: float) -> str | None:
    """Extend a lease; returns the job's state, None if the job was taken over."""
    renewed = await session.execute(
        update(Job)
        .where(Job.id == job_id, Job.attempt == attempt, Job.state.in_(("running", "cancelling")))
        .values(lease_expires_at=lease(seconds))
        .returning(Job.state)
    )
    return renewed.scalar_one_or_none()


async def release_job(session: AsyncSession, job_id: str, attempt: int) -> None:
    """Give a claimed job back, for whoever comes next."""
    await session.execute(
        update(Job)
        .where(Job.id == job_id, Job.attempt == attempt, Job.state.in_(("running", "cancelling")))
        .values(lease_expires_at=None, worker=None)
    )


async def finish_job(
    session: AsyncSession, job_id: str, attempt: int | None, state: str, error: dict[str, Any] | None
) -> bool:
    """End a job, if this attempt still holds it (None: whatever attempt); returns whether it does."""
    fence = [] if attempt is None else [Job.attempt == attempt]
    ended = await session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state.not_in(TERMINAL), *fence)
        .values(
            state=state,
            error=error,
            worker=None,
            lease_expires_at=None,
            finished_at=func.clock_timestamp(),
            updated_at=func.clock_timestamp(),
        )
        .returning(Job.id)
    )
    return ended.scalar() is not None


async def set_progress(session: AsyncSession, job_id: str, done: int, total: int | None, rate: float | None) -> None:
    """Record progress of a running job; it never goes back."""
    await session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state.in_(("running", "cancelling")))
        .values(
            progress_done=func.greatest(Job.progress_done, done),
            progress_total=func.coalesce(total, Job.progress_total),
            progress_rate=rate,
            updated_at=func.clock_timestamp(),
        )
    )


async def reset_job(session: AsyncSession, job_id: str) -> None:
    """Queue a job again from where its finished shards leave it; a worker that still holds an earlier attempt stays fenced off."""
    await session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(
            state="queued", error=None, finished_at=None, losses=0, lease_expires_at=None, worker=None, progress_done=0
        )
    )
    await session.execute(
        update(Shard)
        .where(Shard.job_id == job_id, Shard.state != "done")
        .values(state="queued", attempt=0, lease_expires_at=None, worker=None)
    )


async def abandoned(session: AsyncSession) -> Sequence[str]:
    """Return unfinished jobs that nobody holds: queued for a while, or with a lease that ran out."""
    waiting = and_(Job.state == "queued", Job.updated_at < func.clock_timestamp() - timedelta(seconds=5))
    held = and_(Job.state.in_(("running", "cancelling")), expired(Job.lease_expires_at))
    query = select(Job.id).where(Job.finished_at.is_(None), or_(waiting, held)).order_by(Job.id).limit(100)
    return (await session.execute(query)).scalars().all()


async def add_shards(session: AsyncSession, shards: Sequence[Shard]) -> None:
    """Add a fit's shards."""
    session.add_all(shards)
    await session.flush()


async def has_shards(session: AsyncSession, job_id: str) -> bool:
    """Return whether a fit's shards were planned."""
    return (await session.execute(select(Shard.stage).where(Shard.job_id == job_id).limit(1))).scalar() is not None


async def drop_shards(session: AsyncSession, job_id: str) -> None:
    """Forget a finished fit's shards."""
    await session.execute(delete(Shard).where(Shard.job_id == job_id))


async def open_stage(session: AsyncSession, job_id: str) -> int | None:
    """Return the first stage with unfinished work, None if all is done."""
    query = select(func.min(Shard.stage)).where(Shard.job_id == job_id, Shard.state != "done")
    return (await session.execute(query)).scalar_one_or_none()


async def claim_shard(session: AsyncSession, job_id: str, stage: int, worker: str, seconds: float) -> Shard | None:
    """Take a shard of a stage that nobody works on; the reduction (-1) only when every shard is done."""
    others = select(Shard.ordinal).where(
        Shard.job_id == job_id, Shard.stage == stage, Shard.ordinal >= 0, Shard.state != "done"
    )
    free = or_(Shard.state == "queued", and_(Shard.state == "running", expired(Shard.lease_expires_at)))
    candidate = (
        select(Shard.ordinal)
        .where(Shard.job_id == job_id, Shard.stage == stage, free, or_(Shard.ordinal >= 0, ~others.exists()))
        .order_by(Shard.ordinal)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    claimed = await session.execute(
        update(Shard)
        .where(Shard.job_id == job_id, Shard.stage == stage, Shard.ordinal == candidate)
        .values(state="running", attempt=Shard.attempt + 1, worker=worker, lease_expires_at=lease(seconds))
        .returning(Shard)
        .execution_options(populate_existing=True)
    )
    return claimed.scalar_one_or_none()


async def renew_shard(session: AsyncSession, shard: Shard, seconds: float) -> bool:
    """Extend a shard's lease; returns whether it is still ours."""
    renewed = await session.execute(
        update(Shard)
        .where(*_same(shard), Shard.state == "running")
        .values(lease_expires_at=lease(seconds))
        .returning(Shard.stage)
    )
    return renewed.scalar() is not None


async def finish_shard(session: AsyncSession, shard: Shard, sha256: str) -> bool:
    """Mark a shard done if this attempt still holds it; returns whether it does."""
    done = await session.execute(
        update(Shard)
        .where(*_same(shard), Shard.state == "running")
        .values(state="done", sha256=sha256, worker=None, lease_expires_at=None)
        .returning(Shard.stage)
    )
    if done.scalar() is None:
        return False
    await session.execute(update(Job).where(Job.id == shard.job_id, Job.losses > 0).values(losses=0))
    return True


async def release_shards(session: AsyncSession, worker: str) -> None:
    """Give back every shard a worker holds."""
    await session.execute(
        update(Shard)
        .where(Shard.worker == worker, Shard.state == "running")
        .values(state="queued", worker=None, lease_expires_at=None)
    )


async def units(session: AsyncSession, job_id: str) -> tuple[int, int]:
    """Return a fit's finished and total units."""
    done = func.coalesce(func.sum(Shard.units).filter(Shard.state == "done"), 0)
    row = (
        await session.execute(select(done, func.coalesce(func.sum(Shard.units), 0)).where(Shard.job_id == job_id))
    ).one()
    return int(row[0]), int(row[1])


async def waiting_shards(session: AsyncSession, job_id: str) -> int:
    """Return how many shards of a fit are waiting for a worker."""
    query = select(func.count()).where(Shard.job_id == job_id, Shard.state == "queued", Shard.ordinal >= 0)
    return int((await session.execute(query)).scalar_one())


def _same(shard: Shard) -> tuple[ColumnElement[bool], ...]:
    return (
        Shard.job_id == shard.job_id,
        Shard.stage == shard.stage,
        Shard.ordinal == shard.ordinal,
        Shard.attempt == shard.attempt,
        Shard.worker == shard.worker,  # a retry counts attempts anew
    )
