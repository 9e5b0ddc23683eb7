"""The queue, and the only file that knows procrastinate. A message says `look at job X`; our rows say what there is to do."""

from collections.abc import Awaitable, Callable, Sequence

import procrastinate
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

TASK = "run"
Handler = Callable[[str], Awaitable[None]]


class Queue:
    """Sends messages inside a session's transaction, and receives them in a worker.

    Args:
        url: libpq URL.
        handler: called with the job's id for each message; only a worker has one.
    """

    def __init__(self, url: str, handler: Handler | None = None) -> None:
        self._url = url
        self._handler = handler

    @staticmethod
    async def wake(session: AsyncSession, job_id: str, times: int = 1) -> None:
        """Send messages about a job; they are delivered if and when the session's transaction commits."""
        raw = await (await session.connection()).get_raw_connection()
        app = procrastinate.App(connector=procrastinate.PsycopgConnector())
        for _ in range(times):
            await app.configure_task(TASK, connection=raw.driver_connection).defer_async(job_id=job_id)

    @staticmethod
    async def announced(session: AsyncSession, job_ids: Sequence[str]) -> set[str]:
        """Return which of the jobs have messages that nobody has taken yet."""
        query = text(
            "SELECT DISTINCT args->>'job_id' FROM procrastinate_jobs WHERE status = 'todo' AND args->>'job_id' = ANY(:jobs)"
        )
        return set((await session.execute(query, {"jobs": list(job_ids)})).scalars())

    @staticmethod
    async def forget_lost(session: AsyncSession) -> None:
        """Forget messages that were taken by workers which are gone; their jobs are found by their leases."""
        await session.execute(text("DELETE FROM procrastinate_jobs WHERE status = 'doing' AND worker_id IS NULL"))

    async def receive(self, name: str) -> None:
        """Receive messages one at a time until cancelled.

        Raises:
            procrastinate.exceptions.ConnectorException: if the database is lost; call again.
        """
        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=self._url))

        async def run(job_id: str) -> None:
            assert self._handler is not None
            await self._handler(job_id)

        app.task(name=TASK)(run)
        async with app.open_async():
            await app.run_worker_async(
                name=name,
                concurrency=1,
                install_signal_handlers=False,
                listen_notify=True,
                fetch_job_polling_interval=2,
                delete_jobs=procrastinate.jobs.DeleteJobCondition.ALWAYS,
                shutdown_graceful_timeout=2,
            )
