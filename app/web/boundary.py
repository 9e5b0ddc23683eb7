"""The boundary of every request: who is asking, is the input well-formed, one transaction, one commit.

In order: authenticate, ask for the scope, refuse unknown query parameters and malformed JSON, replay or claim an Idempotency-Key, run the endpoint with one
lazily opened session, store the answer beside the effect, commit, and only then wait if the caller prefers to.
"""

import asyncio
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth.service import authenticate
from app.db.failures import OUTAGE
from app.errors import FieldProblem, InvalidRequest, NotFound, Problem, UnsupportedMedia
from app.jobs.service import finished
from app.web.content import is_json
from app.web.deps import Requirement
from app.web.idempotency import IdempotencyClaim, checked_key, request_hash
from app.web.resources import Resources, resources_of
from app.web.strict_json import parse_strictly
from attribution_core.pointers import pointer_to

MAX_WAIT_SECONDS = 60
_POLL_SECONDS = 0.2
_KEPT = ("idempotent-replayed",)
_PARSED_AT_ONCE = 256 << 10  # bytes; larger bodies would keep other requests waiting
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class TransactionalRoute(APIRoute):
    """A route whose endpoint runs inside the boundary."""

    def get_route_handler(self) -> Handler:
        """Wrap FastAPI's handler."""
        endpoint = super().get_route_handler()
        requirements = [found.call for found in self.dependant.dependencies if isinstance(found.call, Requirement)]
        known = {field.alias for field in get_flat_params(self.dependant) if isinstance(field.field_info, Query)}

        async def handle(request: Request) -> Response:
            resources = resources_of(request)
            if not all(value.isprintable() for value in request.path_params.values() if isinstance(value, str)):
                raise NotFound("Nothing has a name with control characters.")
            request.state.principal = await authenticate(resources.keys, request)
            for requirement in requirements:
                requirement(request)
            _refuse_unknown_parameters(request, known)
            _refuse_other_content(request, self.body_field is not None)
            await _refuse_malformed_json(request)
            response = await _in_transaction(request, resources, endpoint)
            return await _waited(request, resources, response)

        return handle


async def _in_transaction(request: Request, resources: Resources, endpoint: Handler) -> Response:
    key = request.headers.get("idempotency-key")
    if request.method != "POST" or key is None:
        async with resources.sessions() as session:
            return await _run(request, session, endpoint, None)
    owner: str = request.state.principal.id
    claim = IdempotencyClaim(resources.sessions, owner, checked_key(key), await request_hash(request))
    stored = await claim.take()
    if stored is not None:
        return stored  # whoever asks again may wait again
    try:
        async with resources.sessions() as session:
            return await _run(request, session, endpoint, claim)
    except BaseException:
        await asyncio.shield(claim.drop())
        raise


async def _run(request: Request, session: AsyncSession, endpoint: Handler, claim: IdempotencyClaim | None) -> Response:
    """Run the endpoint and commit; on an error before that nothing of it stays, and files it published are taken back.

    A commit that fails may have happened all the same, so its files stay; workers sweep those that no row names.
    """
    request.state.session = session
    try:
        response = await endpoint(request)
        if claim is not None and response.status_code < 400:
            await claim.keep(session, response)
    except BaseException:
        for undo in getattr(request.state, "undo", []):
            undo()
        raise
    await session.commit()
    for after in getattr(request.state, "after_commit", []):
        after()
    return response


async def _waited(request: Request, resources: Resources, response: Response) -> Response:
    """Answer the finished resource if its job ends within the preferred time."""
    match = re.search(r"(?:^|[,;\s])wait=(\d{1,9})\b", request.headers.get("prefer", ""))
    place = response.headers.get("location", "")
    if match is None or response.status_code != 202 or not place.startswith("/v1/jobs/"):
        return response
    deadline = time.monotonic() + min(int(match[1]), MAX_WAIT_SECONDS)
    while time.monotonic() < deadline and not resources.stopping.is_set():
        try:
            async with resources.sessions() as session:
                resource = await finished(session, place.removeprefix("/v1/jobs/"))
            if resource is not None:
                headers = {name: response.headers[name] for name in _KEPT if name in response.headers}
                return JSONResponse(
                    resource.model_dump(mode="json"), 200, headers | {"Preference-Applied": f"wait={match[1]}"}
                )
        except (*OUTAGE, Problem):
            return response  # the job was accepted, whatever has become of it or of the database since
        await resources.pause(_POLL_SECONDS)
    return response


def _refuse_unknown_parameters(request: Request, known: set[str]) -> None:
    unknown = sorted(set(request.query_params) - known)
    if unknown:
        problems = [
            FieldProblem(pointer=pointer_to(["query", name]), detail="unknown parameter") for name in unknown[:20]
        ]
        raise InvalidRequest(f"Unknown query parameter {unknown[0][:64]!r}.", problems)
    if any("\x00" in value or not value.isprintable() for value in request.query_params.values()):
        raise InvalidRequest("A query parameter has a control character.")


def _refuse_other_content(request: Request, takes_json: bool) -> None:
    """Refuse what is said to be no JSON before any of it is read: uploads, which are larger, are not for every endpoint."""
    if takes_json and not is_json(request.headers):
        raise UnsupportedMedia("This endpoint takes application/json.")


async def _refuse_malformed_json(request: Request) -> None:
    if request.method == "POST" and is_json(request.headers):
        body = await request.body()
        if len(body) > _PARSED_AT_ONCE:
            request._json = await asyncio.to_thread(parse_strictly, body)
        elif body:
            request._json = parse_strictly(body)  # what `request.json()` returns from now on
