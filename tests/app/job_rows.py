"""Jobs that tests make and end straight in the database."""

from sqlalchemy import select

from app.db.ids import new_id
from app.db.session import SessionMaker
from app.db.tables import Job, Shard
from app.jobs import repository


async def new_job(sessions: SessionMaker, shards: int = 0) -> str:
    """A running job that a worker with an hour of lease holds, so that the service's own worker leaves it alone."""
    job = Job(
        id=new_id("job"),
        kind="fit",
        state="running",
        resource_type="index",
        resource_id="none",
        progress_unit="examples",
        attempt=1,
    )
    async with sessions.begin() as session:
        job.lease_expires_at = await session.scalar(select(repository.lease(3600)))
        session.add(job)
        await session.flush()
        rows = [
            Shard(job_id=job.id, stage=0, ordinal=n, state="queued", units=10 if n >= 0 else 0)
            for n in (*range(shards), -1)
        ]
        await repository.add_shards(session, rows)
    return job.id


async def finish(sessions: SessionMaker, job_id: str) -> None:
    async with sessions.begin() as session:
        await repository.finish_job(session, job_id, None, "cancelled", None)
