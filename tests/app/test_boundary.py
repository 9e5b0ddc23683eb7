"""Where a request ends: its transaction, the files it made, and the job it waits for."""

import asyncio
from unittest.mock import AsyncMock, MagicMock

import pytest
from fastapi import Request, Response
from sqlalchemy.exc import OperationalError

from app.errors import Conflict, NotFound
from app.web import boundary
from app.web.boundary import _run, _waited
from app.web.effects import undo_on_error


async def test_files_stay_where_a_commit_may_have_happened() -> None:
    """The connection was lost before the database's answer came: the row that names the files may be there."""
    undone: list[str] = []
    lost = OperationalError("COMMIT", {}, Exception("lost"))

    async def endpoint(request: Request) -> Response:
        undo_on_error(request, lambda: undone.append("file"))
        return Response(status_code=201)

    async def refused(request: Request) -> Response:
        await endpoint(request)
        raise Conflict("refused")

    request = Request({"type": "http"})
    session = AsyncMock(commit=AsyncMock(side_effect=lost))
    with pytest.raises(OperationalError):
        await _run(request, session, endpoint, None)
    assert not undone
    with pytest.raises(Conflict):
        await _run(request, session, refused, None)
    assert undone == ["file", "file"], "of both requests, which are one here"


@pytest.mark.parametrize("error", [OperationalError("SELECT", {}, Exception("lost")), NotFound("It was deleted.")])
async def test_who_waits_for_a_job_is_told_of_it_whatever_happens_meanwhile(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The job is there: an error would have the caller ask for it again."""
    monkeypatch.setattr(boundary, "finished", AsyncMock(side_effect=error))
    accepted = Response(status_code=202, headers={"location": "/v1/jobs/job_some"})
    request = Request({"type": "http", "headers": [(b"prefer", b"wait=5")]})
    assert await _waited(request, MagicMock(stopping=asyncio.Event()), accepted) is accepted
