"""Runs jobs: claims, heartbeats, cancellation, and the one transaction in which a job's effect becomes visible."""

import asyncio
import contextlib
import errno
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.failures import OUTAGE, is_outage
from app.db.session import SessionMaker
from app.db.tables import Job, Shard
from app.errors import NotFound, Problem
from app.jobs import repository
from app.jobs.queue import Queue
from app.jobs.service import CANCELLED, RESOURCES, problem, record
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from app.worker.progress import JobProgress
from attribution_core.data.importer import DatasetProblems
from attribution_core.errors import AttributionError, Cancelled
from attribution_core.memory import release_freed

log = structlog.get_logger("headwater.worker")


class LeaseLost(Exception):  # noqa: N818, an event rather than an error
    """Another worker has taken over; nothing this attempt did may count."""


@dataclass
class Running:
    """One job in this worker's hands."""

    job: Job
    progress: JobProgress = field(default_factory=JobProgress)
    shard: Shard | None = None
    after_success: list[Callable[[], None]] = field(default_factory=list)


Effect = Callable[[AsyncSession], Awaitable[None]]
Work = Callable[["Runner", Running], Awaitable[Effect | None]]


@dataclass(frozen=True)
class Kind:
    """How one kind of job is done, and how others may help with it."""

    work: Work
    assist: Work | None = None


class Runner:
    """Executes jobs by kind.

    Args:
        name: this worker's name in leases.
        kinds: what to do for each kind of job.
    """

    def __init__(
        self, settings: Settings, sessions: SessionMaker, artifacts: ArtifactStore, name: str, kinds: dict[str, Kind]
    ) -> None:
        self.settings = settings
        self.sessions = sessions
        self.artifacts = artifacts
        self.name = name
        self.kinds = kinds

    @property
    def lease_seconds(self) -> float:
        """How long a claim holds without renewal."""
        return self.settings.worker.lease_seconds

    async def handle(self, job_id: str) -> None:
        """Do what there is to do for a job: run it, help the worker that runs it, or nothing."""
        async with self.sessions.begin() as session:
            job = await repository.claim_job(session, job_id, self.name, self.lease_seconds)
            if job is not None:
                await record(session, job)
            else:
                job = await repository.get(session, job_id)
                if job is None or job.state != "running":
                    return
                kind = self.kinds[job.kind]
                if kind.assist is None:
                    return
        if job.worker == self.name:
            await self._lead(Running(job))
        else:
            with contextlib.suppress(LeaseLost, Cancelled, AttributionError, Problem):
                assert kind.assist is not None
                await kind.assist(self, Running(job))
        release_freed()

    async def sweep(self) -> None:
        """Wake a worker for every job that nobody holds."""
        async with self.sessions.begin() as session:
            await Queue.forget_lost(session)
            await wake_abandoned(session)

    async def _lead(self, running: Running) -> None:
        job, kind = running.job, self.kinds[running.job.kind]
        log.info("job started", job=job.id, kind=job.kind, attempt=job.attempt)
        try:
            if job.state == "cancelling":
                raise Cancelled("the job was stopped")
            if job.losses >= self.settings.worker.max_attempts:
                raise AttributionError(f"the job ended its worker {job.losses} times")
            async with self.heartbeat(running):
                effect = await kind.work(self, running)
            if effect is not None:
                await self._succeed(running, effect)
        except LeaseLost:
            log.warning("job taken over by another worker", job=job.id, attempt=job.attempt)
        except Cancelled:
            await self._cancelled(running)
        except asyncio.CancelledError:
            await asyncio.shield(self._release(running))
            raise
        except OUTAGE as error:
            await self._interrupted(running, error)
        except (AttributionError, Problem) as error:
            # What the caller can mend is told to the caller; the log does not repeat what may be their data.
            log.info("job refused", job=job.id, kind=type(error).__name__)
            await self._ended(running, "failed", _error_of(error))
        except Exception as error:
            log.exception("job failed", job=job.id)
            await self._ended(running, "failed", _error_of(error))

    @contextlib.asynccontextmanager
    async def heartbeat(self, running: Running) -> AsyncIterator[None]:
        """Renew leases, publish progress and watch for cancellation while the body runs.

        Raises:
            LeaseLost: if the job or shard was taken over meanwhile.
        """
        beat = asyncio.create_task(self._beat(running))
        try:
            yield
        finally:
            beat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beat

    async def _beat(self, running: Running) -> None:
        pause = min(1.0, self.lease_seconds / 4)
        shown = -1
        while True:
            await asyncio.sleep(pause)
            try:
                async with self.sessions.begin() as session:
                    state = await self._renewed(session, running)
                    if state in ("lost", "cancelling"):
                        running.progress.stop()
                    if state == "running" and running.progress.done != shown:
                        shown = running.progress.done
                        await self._publish_progress(session, running)
            except OUTAGE as error:
                log.warning("heartbeat failed", job=running.job.id, error=str(error)[:200])

    async def _renewed(self, session: AsyncSession, running: Running) -> str:
        """Renew what this worker holds; returns `running`, `cancelling`, `assisting` or `lost`."""
        shard = running.shard
        kept = shard is None or await repository.renew_shard(session, shard, self.lease_seconds)
        if not kept and running.shard is shard:  # else it was finished between the question and the answer
            return "lost"
        if running.job.worker != self.name:
            state = await repository.state_of(session, running.job.id)
            return "assisting" if state == "running" else "lost"
        return await repository.renew_job(session, running.job.id, running.job.attempt, self.lease_seconds) or "lost"

    async def _publish_progress(self, session: AsyncSession, running: Running) -> None:
        progress, job = running.progress, running.job
        await repository.set_progress(session, job.id, progress.done, None, progress.rate())
        fresh = await repository.get(session, job.id)
        if fresh is not None:
            await record(session, fresh, "progress")

    async def _succeed(self, running: Running, effect: Effect) -> None:
        """Apply the effect and end the job in one transaction, if this attempt still holds it."""
        job = running.job
        async with self.sessions.begin() as session:
            await effect(session)
            await repository.set_progress(
                session, job.id, running.progress.done, running.progress.done, running.progress.rate()
            )
            if not await repository.finish_job(session, job.id, job.attempt, "succeeded", None):
                await session.rollback()
                raise Cancelled("the job was stopped or taken over")
            await repository.drop_shards(session, job.id)
            await self._record_end(session, job.id)
        self.artifacts.drop_workspace(job.id)
        for action in running.after_success:
            action()
        log.info("job succeeded", job=job.id)

    async def _interrupted(self, running: Running, error: Exception) -> None:
        """Give back a job whose database was lost; rows that cannot be would fail again, so they end it."""
        if isinstance(error, DBAPIError) and not is_outage(error):
            log.error("job failed in the database", job=running.job.id, error=type(error).__name__)
            await self._ended(running, "failed", _error_of(error))
        else:
            log.warning("database lost; the job goes on later", job=running.job.id, error=str(error)[:200])
            await self._release(running)

    async def _cancelled(self, running: Running) -> None:
        """End a cancelled job; one whose lease was lost goes on with whoever has it, or comes next."""
        async with self.sessions() as session:
            state = await repository.state_of(session, running.job.id)
        if state == "cancelling":
            await self._ended(running, "cancelled", None, CANCELLED)
        elif state == "running":
            log.warning("job stopped without being cancelled", job=running.job.id, attempt=running.job.attempt)
            await self._release(running)

    async def _ended(
        self, running: Running, state: str, error: dict[str, object] | None, told: dict[str, object] | None = None
    ) -> None:
        job = running.job
        async with self.sessions.begin() as session:
            if await repository.finish_job(session, job.id, job.attempt, state, error):
                with contextlib.suppress(NotFound):  # it may be gone; its job still ends
                    await RESOURCES[job.kind].fail(session, job.resource_id, told or error or {})
                await self._record_end(session, job.id)
        log.info("job ended", job=job.id, state=state)

    async def _release(self, running: Running) -> None:
        with contextlib.suppress(*OUTAGE):
            async with self.sessions.begin() as session:
                await repository.release_shards(session, self.name)
                await repository.release_job(session, running.job.id, running.job.attempt)
                await Queue.wake(session, running.job.id)

    @staticmethod
    async def _record_end(session: AsyncSession, job_id: str) -> None:
        job = await repository.get(session, job_id)
        if job is not None:
            await record(session, job)


async def wake_abandoned(session: AsyncSession) -> None:
    """Send a message about every job that nobody holds, unless one is under way already.

    Else a long queue would get messages faster than they are read, and what comes next would wait behind all of them.
    """
    abandoned = await repository.abandoned(session)
    known = await Queue.announced(session, abandoned)
    for job_id in abandoned:
        if job_id not in known:
            await Queue.wake(session, job_id)


async def computed(function: Callable[[], object], progress: JobProgress) -> object:
    """Run a computation in a thread; if this task is cancelled the computation is told to stop and waited for a while."""
    task = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        progress.stop()
        with contextlib.suppress(BaseException):
            await asyncio.wait_for(task, 5)
        raise


def own_folder(runner: Runner, running: Running, name: str) -> Path:
    """Return an empty folder of this attempt alone; a worker that was taken for dead may still write to that of an earlier one.

    It may also come here late itself, so what a later attempt writes is left alone. One that lost the database comes here again.
    """
    workspace = runner.artifacts.workspace(running.job.id)
    for attempt in range(1, running.job.attempt + 1):
        shutil.rmtree(workspace / f"{name}-{attempt}", ignore_errors=True)
    folder = workspace / f"{name}-{running.job.attempt}"
    folder.mkdir()
    return folder


def _error_of(error: BaseException) -> dict[str, object]:
    """Return the problem that describes an exception to the job's owner."""
    match error:
        case DatasetProblems():
            listed = [
                {"pointer": f"/rows/{entry['row']}/{entry['column']}", "detail": entry["problem"]}
                for entry in error.problems
            ]
            return problem("invalid-data", "The data has problems", str(error), listed) | {"total": error.total}
        case AttributionError():
            pointers = [{"pointer": error.pointer, "detail": str(error)}] if error.pointer else []
            return problem("invalid-request", "Invalid request", str(error), pointers)
        case Problem():
            return problem(error.slug, error.title, error.detail)
        case IntegrityError():
            return problem("conflict", "Conflict", "Something that the job needs was deleted meanwhile.") | {
                "status": 409
            }
        case DBAPIError():
            return problem(
                "internal", "Internal error", "The database refused the result; the log has the details."
            ) | {"status": 500}
        case MemoryError():
            return problem("out-of-memory", "Out of memory", "The worker ran out of memory.")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            return problem("storage-full", "Storage failed", f"A file could not be written: {error.strerror}.") | {
                "status": 507
            }
        case _:
            return problem("internal", "Internal error", f"{type(error).__name__}: {error}") | {"status": 500}


def stopwatch() -> Callable[[], float]:
    """Return a function that tells the seconds since now."""
    began = time.monotonic()
    return lambda: round(time.monotonic() - began, 3)
