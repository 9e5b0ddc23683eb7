"""Jobs: what they are doing, their events, stopping and retrying them."""

import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from app.db.failures import OUTAGE
from app.db.tables import JobEvent
from app.errors import Conflict, IdempotencyInFlight, InvalidRequest, NotFound, problems
from app.jobs import service
from app.jobs.schemas import TERMINAL, JobKind, JobOut, JobState
from app.web.boundary import TransactionalRoute
from app.web.deps import IdempotencyKey, PageDep, ResourcesDep, SessionDep, require
from app.web.pagination import PageOf

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=TransactionalRoute)
_POLL_SECONDS = 0.5
_RETRY = b"retry: 1000\n\n"


@router.get("", summary="List jobs", dependencies=[require("read")], responses=problems())
async def list_jobs(
    session: SessionDep,
    page: PageDep,
    state: Annotated[JobState | None, Query()] = None,
    kind: Annotated[JobKind | None, Query()] = None,
) -> PageOf[JobOut]:
    """Return jobs, newest first."""
    return await service.list_jobs(session, page, state, kind)


@router.get("/{job}", summary="Get a job", dependencies=[require("read")], responses=problems(NotFound))
async def get_job(session: SessionDep, job: str) -> JobOut:
    """Return a job's state, progress with rate and remaining time, and the problem that ended it, if one did."""
    return service.shown(await service.find(session, job))


@router.get(
    "/{job}/events",
    summary="Follow a job",
    dependencies=[require("read")],
    response_class=StreamingResponse,
    responses={
        **problems(NotFound),
        200: {
            "content": {"text/event-stream": {}},
            "description": "A stream of `state` and `progress` events; `data` is the job.",
        },
        204: {"description": "The job has ended, and nothing came after that event."},
    },
)
async def follow_job(
    request: Request,
    session: SessionDep,
    resources: ResourcesDep,
    job: str,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", description="Go on after this event.")] = None,
) -> Response:
    """Stream a job's events until it ends. A reconnecting client sends `Last-Event-ID` and misses nothing."""
    found = await service.find(session, job)
    after = _event_id(last_event_id)
    if found.state in TERMINAL and not await service.events(session, job, after):
        return Response(status_code=204)  # tells an EventSource to connect no more
    await session.close()

    async def stream() -> AsyncIterator[bytes]:
        position = after
        yield _RETRY
        while not resources.stopping.is_set() and not await request.is_disconnected():
            try:
                news = await resources.following.news(job, position)
            except OUTAGE:
                return  # the client reconnects and goes on where it was
            for event in news.events:
                position = event.id
                yield _encoded(event)
                if event.type == "state" and event.data["state"] in TERMINAL:
                    return
            if news.ended:
                return
            if not news.events:
                yield b": waiting\n\n"
            # All followers read at the same moments: those of one job share what they read.
            await resources.pause(_POLL_SECONDS - time.monotonic() % _POLL_SECONDS)
        yield _RETRY  # to another process, or to this one when it is back

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


@router.post(
    "/{job}/cancel",
    summary="Cancel a job",
    status_code=202,
    dependencies=[require("write")],
    responses=problems(NotFound, Conflict, IdempotencyInFlight),
)
async def cancel_job(session: SessionDep, job: str, _: IdempotencyKey = None) -> JobOut:
    """Ask a job to stop. It ends as `cancelled` within five seconds and leaves nothing visible."""
    return service.shown(await service.cancel(session, job))


@router.post(
    "/{job}/retry",
    summary="Retry a job",
    status_code=202,
    dependencies=[require("write")],
    responses=problems(NotFound, Conflict, IdempotencyInFlight),
)
async def retry_job(session: SessionDep, job: str, _: IdempotencyKey = None) -> JobOut:
    """Queue a failed or cancelled job again. Shards that were finished are not computed again."""
    return service.shown(await service.retry(session, job))


def _event_id(given: str | None) -> int:
    if given is None:
        return 0
    if not re.fullmatch(r"\d{1,18}", given):
        raise InvalidRequest("Last-Event-ID is not an event's id.", pointer="/header/Last-Event-ID")
    return int(given)


def _encoded(event: JobEvent) -> bytes:
    return format_sse_event(id=str(event.id), event=event.type, data_str=json.dumps(event.data, separators=(",", ":")))
