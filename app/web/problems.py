"""Every exception that is foreseen becomes a problem document, others in `app.web.middleware`; nothing of a traceback leaves the process."""

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.db.failures import is_outage
from app.errors import (
    MAX_ERRORS,
    UNFORESEEN,
    BadRequest,
    Conflict,
    CorruptArtifact,
    DatabaseUnavailable,
    FieldProblem,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    Problem,
    UnsupportedMedia,
    field_problems,
)
from app.web.middleware import request_id_of
from attribution_core.errors import AttributionError, CorruptArtifactError
from attribution_core.pointers import pointer_to

log = structlog.get_logger("headwater.api")
_BY_STATUS: dict[int, type[Problem]] = {
    400: BadRequest,
    404: NotFound,
    405: MethodNotAllowed,
    413: PayloadTooLarge,
    415: UnsupportedMedia,
}


def answer(request: Request, problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return a problem as a response."""
    return JSONResponse(
        problem.document(request_id_of(request)),
        problem.status,
        {**(headers or {}), **problem.headers},
        media_type="application/problem+json",
    )


def install(app: FastAPI) -> None:
    """Register a handler for every kind of exception."""

    @app.exception_handler(Problem)
    async def of_problem(request: Request, error: Problem) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, InvalidRequest.of_fields(_field_problems(error)))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        kind = _BY_STATUS.get(error.status_code, BadRequest if error.status_code < 500 else InternalError)
        return answer(request, kind(str(error.detail)), dict(error.headers or {}))

    @app.exception_handler(AttributionError)
    async def of_library(request: Request, error: AttributionError) -> JSONResponse:
        if isinstance(error, CorruptArtifactError):
            log.error("damaged files", error=str(error))
            return answer(request, CorruptArtifact(str(error)))
        return answer(request, InvalidRequest(str(error), pointer=error.pointer))

    @app.exception_handler(IntegrityError)
    async def of_race(request: Request, error: IntegrityError) -> JSONResponse:
        # Services tell what they foresee; what is left are two requests about the same things at the same time.
        return answer(
            request, Conflict("Something that this refers to was made or deleted at the same time; try again.")
        )

    @app.exception_handler(ClientDisconnect)
    async def of_disconnect(request: Request, error: ClientDisconnect) -> JSONResponse:
        # Nobody hears it; it is no fault of the service either.
        return answer(request, BadRequest("The connection was closed before the whole body had come."))

    @app.exception_handler(DBAPIError)
    @app.exception_handler(PoolTimeout)
    async def of_database(request: Request, error: Exception) -> JSONResponse:
        if is_outage(error):
            return answer(request, DatabaseUnavailable("The database does not answer; try again soon."))
        log.error("database error", error=type(error).__name__)
        return answer(request, InternalError(UNFORESEEN))


def _field_problems(error: RequestValidationError) -> list[FieldProblem]:
    """Return what is wrong with the body and with parameters; the latter are under /query, /path or /header."""
    found = error.errors()[:MAX_ERRORS]
    body = [{**entry, "loc": entry["loc"][1:]} for entry in found if entry["loc"][0] == "body"]
    parameters = [
        FieldProblem(pointer=pointer_to(entry["loc"][:2]), detail=entry["msg"])
        for entry in found
        if entry["loc"][0] != "body"
    ]
    return parameters + field_problems(body, error.body)
