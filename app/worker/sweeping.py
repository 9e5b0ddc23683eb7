"""Removes files that nothing will ask for again: workspaces of jobs that are over, and weights that no row names.

A worker that is killed between publishing and committing leaves both behind; if its job is then cancelled, no later attempt finds them.
"""

import time

from app.db.session import SessionMaker
from app.db.tables import Job
from app.errors import Problem
from app.jobs import repository
from app.jobs.service import RESOURCES
from app.models import service as models
from app.storage.artifacts import ArtifactStore

# Longer than from a publication to its commit. A job that is tried again commits what an earlier attempt published: while one may, nothing is swept.
ORPHAN_SECONDS = 600.0


async def sweep_files(sessions: SessionMaker, artifacts: ArtifactStore, orphan_seconds: float = ORPHAN_SECONDS) -> None:
    """Remove the workspaces of jobs that have succeeded or cannot be tried again, and checkpoints that no row names."""
    for name in artifacts.workspaces():
        if name.startswith("job_") and await _over(sessions, name):
            artifacts.drop_workspace(name)
    before = time.time() - orphan_seconds
    async with sessions() as session:
        orphans = set(artifacts.published_before(models.CHECKPOINTS, before))
        orphans -= await models.named_artifacts(session, sorted(orphans))
        if orphans and not await repository.any_unfinished(session, ("training", "unlearning")):
            for name in orphans:
                artifacts.delete(name)


async def _over(sessions: SessionMaker, job_id: str) -> bool:
    """Return whether a job needs its workspace no more; one that could not be tried again forgets its finished shards with it."""
    async with sessions() as session:
        job = await repository.get(session, job_id)
    if job is None or job.state not in repository.RETRY_STATES:
        return job is None or job.state == "succeeded"
    if await _retryable(sessions, job):
        return False
    async with sessions.begin() as session:
        await repository.drop_shards(session, job_id)
    return True


async def _retryable(sessions: SessionMaker, job: Job) -> bool:
    """Return whether a retry would be accepted; what it would do is not kept."""
    async with sessions() as session:
        try:
            await RESOURCES[job.kind].begin(session, job)
        except Problem:
            return False
        finally:
            await session.rollback()
    return True
