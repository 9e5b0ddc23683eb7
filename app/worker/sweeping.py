"""Removes what nothing will ask for again, as killed processes leave it: workspaces, uploads, published files that no row names, old keys and progress.

A worker that is killed between publishing and committing leaves files behind, an api between committing a deletion and removing them.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from app.banks import service as banks
from app.datasets import service as datasets
from app.db.failures import OUTAGE
from app.db.session import SessionMaker
from app.db.tables import Job
from app.errors import Problem
from app.indexes import service as indexes
from app.jobs import repository
from app.jobs.schemas import JobKind
from app.jobs.service import RESOURCES
from app.models import service as models
from app.storage.artifacts import ArtifactStore
from app.web.idempotency import forget_expired

log = structlog.get_logger("headwater.worker")
# Longer than from a file's writing to the commit of its row.
ORPHAN_SECONDS = 600.0
# A job that takes a day reports its progress some ten thousands of times.
_PROGRESS_HOURS = 24.0
_NAMES_AT_ONCE = 1000


@dataclass(frozen=True)
class Named:
    """Published things that rows name.

    Attributes:
        pattern: of their names in the store.
        named: returns which of some names a row has.
        makers: kinds of jobs that commit what an earlier attempt published, however old: while one may, nothing is removed.
    """

    pattern: str
    named: Callable[[AsyncSession, Sequence[str]], Awaitable[set[str]]]
    makers: tuple[JobKind, ...] = ()


_PUBLISHED = (
    Named("checkpoints/*", models.named_artifacts, ("training", "unlearning")),
    Named("datasets/*", datasets.named_artifacts),
    Named("indexes/*", indexes.named_artifacts),
    Named("banks/*/*/*", banks.named_artifacts, ("evaluation", "fit")),
)


async def sweep_files(
    sessions: SessionMaker, artifacts: ArtifactStore, kept_hours: float, orphan_seconds: float = ORPHAN_SECONDS
) -> None:
    """Remove what is not needed any more; what is wrong with one thing is logged and leaves the others to be swept.

    What no row names is removed in a thread, as leases are renewed meanwhile. A workspace is not: were the worker stopped in the middle,
    its rows would come back and its files would not.

    Args:
        sessions: of the database.
        artifacts: the files.
        kept_hours: for which the finished shards of a job that failed or was cancelled are kept for a retry.
        orphan_seconds: after which a file that no row names will get none.
    """
    if not await _ours(sessions, artifacts):
        return
    before = time.time() - orphan_seconds
    async with sessions.begin() as session:
        await forget_expired(session)
        await repository.forget_progress(session, _PROGRESS_HOURS)
    for name in artifacts.workspaces():
        if name.startswith("job_"):
            with _apart(name):
                await _sweep_workspace(sessions, artifacts, name, kept_hours)
    await asyncio.to_thread(artifacts.drop_unfinished_before, before)
    for names in _some_at_once(artifacts.uploads_before(before)):
        async with sessions() as session:
            needed = await datasets.needed_uploads(session, names)
        for name in set(names) - needed:
            await asyncio.to_thread(artifacts.drop_upload, name)
    for kind in _PUBLISHED:
        with _apart(kind.pattern):
            await _sweep_published(sessions, artifacts, kind, before)


@contextmanager
def _apart(name: str) -> Iterator[None]:
    try:
        yield
    except OUTAGE:
        raise
    except Exception:
        log.exception("not swept", name=name)


async def _ours(sessions: SessionMaker, artifacts: ArtifactStore) -> bool:
    """Return whether the files are this database's, told by a job: another one, such as a new one, names none of them."""
    async with sessions() as session:
        mark = artifacts.owner()
        if mark is None:
            mark = await repository.oldest(session)
            if mark is not None:
                artifacts.claim(mark)
        ours = mark is not None and await repository.state_of(session, mark) is not None
    if mark is not None and not ours:
        log.error("the data folder belongs to another database; nothing is swept", job=mark)
    return ours


async def _sweep_published(sessions: SessionMaker, artifacts: ArtifactStore, kind: Named, before: float) -> None:
    for names in _some_at_once(artifacts.published_before(kind.pattern, before)):
        async with sessions() as session:
            orphans = set(names) - await kind.named(session, names)
        for name in orphans:
            async with sessions() as session:
                if await repository.any_unfinished(session, kind.makers) or await kind.named(session, [name]):
                    continue
            await asyncio.to_thread(artifacts.delete, name)


async def _sweep_workspace(sessions: SessionMaker, artifacts: ArtifactStore, job_id: str, kept_hours: float) -> None:
    """Remove the workspace of a job that needs it no more, and with it what its rows say of finished shards.

    The job is locked, so that nobody tries it again meanwhile.
    """
    async with sessions.begin() as session:
        job = await repository.get(session, job_id, lock=True)
        if job is None or await _over(session, job, kept_hours):
            await repository.drop_shards(session, job_id)
            artifacts.drop_workspace(job_id)


async def _over(session: AsyncSession, job: Job, kept_hours: float) -> bool:
    if job.state not in repository.RETRY_STATES:
        return job.state == "succeeded"
    return await repository.ended_before(session, job.id, kept_hours) or not await _retryable(session, job)


async def _retryable(session: AsyncSession, job: Job) -> bool:
    """Return whether a retry would be accepted; what it would do is not kept."""
    attempt = await session.begin_nested()
    try:
        await RESOURCES[job.kind].begin(session, job)
    except Problem:
        return False
    finally:
        await attempt.rollback()
    return True


def _some_at_once(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + _NAMES_AT_ONCE] for start in range(0, len(names), _NAMES_AT_ONCE))
