"""What the process holds for its whole life; requests reach it through `request.app.state.resources`."""

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from sqlalchemy.ext.asyncio import AsyncEngine

from app.auth.service import KeyRing
from app.db.session import SessionMaker
from app.engine.client import EngineClient
from app.jobs.following import Following
from app.settings import Settings
from app.storage.artifacts import ArtifactStore


@dataclass(frozen=True)
class Resources:
    """The api process's connections, files and children."""

    settings: Settings
    database: AsyncEngine
    sessions: SessionMaker
    artifacts: ArtifactStore
    engine: EngineClient
    keys: KeyRing
    following: Following
    stopping: asyncio.Event  # set when the process is told to end: whatever waits for a job answers then

    @property
    def uploads(self) -> Path:
        """Folder of files that were uploaded and wait for their import."""
        return self.settings.data_dir / "uploads"

    async def pause(self, seconds: float) -> None:
        """Wait, at most until the process is told to end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)


def resources_of(request: Request) -> Resources:
    """Return the process's resources."""
    found: Resources = request.app.state.resources
    return found
