"""Around every request: its id, its limits, and what is logged and counted of it."""

import re
import time
from collections.abc import Sequence

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.db.ids import new_id
from app.errors import UNFORESEEN, BadRequest, InternalError, PayloadTooLarge, Problem
from app.telemetry import REQUEST_SECONDS, REQUESTS
from app.web.content import is_form

_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
# Callers may name any; each that is counted is kept for ever.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
log = structlog.get_logger("headwater.access")


class Observed:
    """Gives each request an id, answers what went wrong, logs the outcome without bodies or headers, and counts it by route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        began, status = time.perf_counter(), 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self.app(scope, receive, observed)
        except Exception as error:
            if status:
                raise  # half of an answer is under way; the server closes its connection
            log.error("unhandled error", exc_info=error)
            await _send_problem(InternalError(UNFORESEEN), scope, receive, observed)
        finally:
            seconds = time.perf_counter() - began
            route = _route_of(scope)
            status = status or 500
            REQUESTS.labels(scope["method"] if scope["method"] in _METHODS else "OTHER", route, status).inc()
            REQUEST_SECONDS.labels(route).observe(seconds)
            log.info("request", method=scope["method"][:16], route=route, status=status, ms=round(1000 * seconds, 1))
            structlog.contextvars.clear_contextvars()


class LimitedBody:
    """Stops reading a body that is larger than its kind may be."""

    def __init__(self, app: ASGIApp, json_bytes: int, upload_bytes: int) -> None:
        self.app = app
        self.json_bytes = json_bytes
        self.upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self.upload_bytes if is_form(headers) else self.json_bytes
        length = headers.get("content-length", "")
        declared = int(length) if length.isdecimal() and len(length) < 20 else 0
        total = 0

        async def limited() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if max(total, declared) > limit:
                raise PayloadTooLarge(f"The body is larger than {limit:,} bytes.")
            return message

        await self.app(scope, limited, send)


class KnownHosts:
    """Answers only the host names the operator allowed, so that no other page's name can be pointed at this service."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.app = app
        self.allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http" and not self._knows(Headers(scope=scope).get("host", "")):
            problem = BadRequest("This service does not answer to that host name; see HEADWATER_ALLOWED_HOSTS.")
            await _send_problem(problem, scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _knows(self, host: str) -> bool:
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        return "*" in self.allowed or name.lower() in self.allowed


async def _send_problem(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    document = problem.document(scope.get("state", {}).get("request_id", ""))
    await JSONResponse(document, problem.status, media_type="application/problem+json")(scope, receive, send)


def _route_of(scope: Scope) -> str:
    """Return the path template a request matched, so that metrics and logs hold no names of users' things."""
    matched = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    return getattr(matched, "path", None) or "unmatched"


def request_id_of(request: Request) -> str:
    """Return the request's id."""
    return str(getattr(request.state, "request_id", ""))
