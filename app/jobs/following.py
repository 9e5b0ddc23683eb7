"""What those who follow jobs read: equal reads at the same time are one, and few go on at once, so that requests find connections."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from app.db.session import SessionMaker
from app.db.tables import JobEvent
from app.jobs import service

_AT_ONCE = 4


@dataclass(frozen=True)
class News:
    """Events of a job after another, and whether it has ended without there being more."""

    events: Sequence[JobEvent]
    ended: bool


class Following:
    """Reads on behalf of all followers of this process."""

    def __init__(self, sessions: SessionMaker) -> None:
        self._sessions = sessions
        self._free = asyncio.Semaphore(_AT_ONCE)
        self._reads: dict[tuple[str, int], asyncio.Task[News]] = {}

    async def news(self, job_id: str, after: int) -> News:
        """Return a job's events after an event id; whoever asks the same meanwhile is told the same."""
        asked = (job_id, after)
        read = self._reads.get(asked)
        if read is None:
            read = self._reads[asked] = asyncio.create_task(self._read(job_id, after))
            read.add_done_callback(lambda done: self._forget(asked, done))
        return await asyncio.shield(read)  # who stops listening does not stop it for the others

    async def _read(self, job_id: str, after: int) -> News:
        async with self._free, self._sessions() as session:
            found = await service.events(session, job_id, after)
            return News(found, not found and await service.is_finished(session, job_id))

    def _forget(self, asked: tuple[str, int], done: asyncio.Task[News]) -> None:
        del self._reads[asked]
        if not done.cancelled():
            done.exception()  # seen here too: those who asked may have gone
