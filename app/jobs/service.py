"""Submitting, watching and stopping jobs."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.base import Base
from app.db.ids import new_id
from app.db.tables import Job, JobEvent
from app.errors import Conflict, InUse, NotFound
from app.jobs import repository
from app.jobs.queue import Queue
from app.jobs.schemas import TERMINAL, JobKind, JobOut, JobProgress
from app.web.pagination import Page, PageOf, cut


@dataclass(frozen=True)
class Resource:
    """What a kind of job does to the thing it makes, besides succeeding.

    Attributes:
        begin: called when the job is tried again; refuses where it could not succeed any more.
        fail: called with the problem when the job ends without success.
    """

    begin: Callable[[AsyncSession, Job], Awaitable[None]]
    fail: Callable[[AsyncSession, str, dict[str, Any]], Awaitable[None]]


# Filled by the domains, which know jobs; jobs do not know them.
RESOURCES: dict[str, Resource] = {}
# How clients see what a kind of job made; filled by the domains too.
SHOWN: dict[str, Callable[[AsyncSession, str], Awaitable[BaseModel]]] = {}
# Each returns the jobs that may need a row of whatever table.
NEEDING: list[Callable[[AsyncSession, Base], Awaitable[Sequence[str]]]] = []


async def submit(
    session: AsyncSession, kind: JobKind, resource_type: str, resource_id: str, *, unit: str, total: int | None = None
) -> Job:
    """Create a job and the message that wakes a worker, both in the caller's transaction."""
    job = Job(
        id=new_id("job"),
        kind=kind,
        state="queued",
        resource_type=resource_type,
        resource_id=resource_id,
        progress_unit=unit,
        progress_total=total,
    )
    session.add(job)
    await session.flush()
    await session.refresh(job)
    await record(session, job)
    await Queue.wake(session, job.id)
    return job


async def find(session: AsyncSession, job_id: str, *, lock: bool = False) -> Job:
    """Return a job.

    Raises:
        NotFound: if there is none.
    """
    job = await repository.get(session, job_id, lock=lock)
    if job is None:
        raise NotFound(f"There is no job {job_id[:64]!r}.")
    return job


async def refuse_if_needed(session: AsyncSession, thing: Base) -> None:
    """Refuse to delete something while a job that needs it has not ended.

    Raises:
        InUse: naming the job.
    """
    for needing in NEEDING:
        job_id = await repository.unfinished(session, await needing(session, thing))
        if job_id is not None:
            raise InUse(f"Job {job_id} needs it: cancel the job, or wait until it has ended.")


async def list_jobs(session: AsyncSession, page: Page, state: str | None, kind: str | None) -> PageOf[JobOut]:
    """Return one page of jobs, newest first."""
    rows, following = cut(await repository.page(session, page, state, kind), page, "jobs")
    return PageOf[JobOut](items=[shown(job) for job in rows], next=following)


async def cancel(session: AsyncSession, job_id: str) -> Job:
    """Ask a job to stop; a queued one has stopped at once.

    Raises:
        Conflict: if it has ended already.
    """
    job = await find(session, job_id, lock=True)
    if job.state in TERMINAL:
        raise Conflict(f"The job has {job.state} already.")
    if job.state == "queued":
        await repository.finish_job(session, job.id, None, "cancelled", None)
        await RESOURCES[job.kind].fail(session, job.resource_id, CANCELLED)
        job = await find(session, job_id)
    else:
        job.state = "cancelling"
        await Queue.wake(session, job.id)
    await session.flush()
    await record(session, job)
    return job


async def retry(session: AsyncSession, job_id: str) -> Job:
    """Queue a failed or cancelled job again; finished shards are kept.

    Raises:
        Conflict: if it is in another state, or what it makes or needs was deleted.
    """
    job = await find(session, job_id, lock=True)
    if job.state not in repository.RETRY_STATES:
        raise Conflict(f"Only failed or cancelled jobs can be tried again; this one is {job.state}.")
    await repository.reset_job(session, job_id)
    try:
        await RESOURCES[job.kind].begin(session, job)
    except NotFound as error:
        raise Conflict(f"The job cannot be tried again: {error.detail}") from None
    await Queue.wake(session, job_id)
    job = await find(session, job_id)
    await record(session, job)
    return job


async def finished(session: AsyncSession, job_id: str) -> BaseModel | None:
    """Return what a job made as clients see it, None before it has ended.

    Raises:
        NotFound: if either is gone.
    """
    job = await find(session, job_id)
    return await SHOWN[job.kind](session, job.resource_id) if job.state in TERMINAL else None


async def is_finished(session: AsyncSession, job_id: str) -> bool:
    """Return whether a job has ended (or is gone)."""
    return (await repository.state_of(session, job_id)) in (*TERMINAL, None)


async def events(session: AsyncSession, job_id: str, after: int) -> Sequence[JobEvent]:
    """Return a job's events after an event id."""
    return await repository.events_after(session, job_id, after)


async def record(session: AsyncSession, job: Job, kind: str = "state") -> None:
    """Add the job as it is now to its event stream."""
    await repository.add_event(session, job.id, kind, shown(job).model_dump(mode="json"))


def shown(job: Job) -> JobOut:
    """Return a job as clients see it."""
    rate, total = job.progress_rate, job.progress_total
    running = job.state in ("running", "cancelling")
    left = max(total - job.progress_done, 0) if total is not None else None
    return JobOut(
        id=job.id,
        kind=job.kind,
        state=job.state,
        resource_type=job.resource_type,
        resource_id=job.resource_id,
        attempt=job.attempt,
        progress=JobProgress(
            done=job.progress_done,
            total=total,
            unit=job.progress_unit,
            rate=rate,
            eta_seconds=round(left / rate, 1) if running and left is not None and rate else None,
        ),
        error=job.error,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


def problem(slug: str, title: str, detail: str, errors: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return a job's error in the form of a problem document."""
    return {"type": f"/problems/{slug}", "title": title, "status": 422, "detail": detail, "errors": list(errors)}


CANCELLED = problem("cancelled", "Cancelled", "The job was cancelled.")
