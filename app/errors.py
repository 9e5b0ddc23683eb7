"""Every error a client can meet, as RFC 9457 problems. The class says what it is, the instance what to do about it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from attribution_core.pointers import pointer_to, steps_into

MAX_ERRORS = 100
_MAX_DETAIL = 2000
UNFORESEEN = "Something failed in the service; its log has the details."


def clipped(text: str) -> str:
    """Return a message that does not repeat at length what was sent."""
    return text if len(text) <= _MAX_DETAIL else f"{text[:_MAX_DETAIL]}…"


class FieldProblem(BaseModel):
    """One field that is wrong."""

    pointer: str = Field(description="JSON pointer to the field; empty for the whole.")
    detail: Annotated[str, AfterValidator(clipped)]


def field_problems(
    errors: Sequence[Mapping[str, Any]], document: object, at: tuple[str, ...] = ()
) -> list[FieldProblem]:
    """Return what pydantic found wrong with a document, each once and at most 100 of them.

    Args:
        errors: entries of `ValidationError.errors()`, with their input.
        document: what was validated.
        at: where the document is in what was sent.
    """
    found = ((pointer_to((*at, *steps_into(document, entry))), entry["msg"]) for entry in errors[:MAX_ERRORS])
    return [FieldProblem(pointer=pointer, detail=detail) for pointer, detail in dict.fromkeys(found)]


class ProblemDocument(BaseModel):
    """The body of every error, `application/problem+json`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "/problems/not-found",
                    "title": "Not found",
                    "status": 404,
                    "detail": "There is no index 'demo'.",
                    "errors": [],
                    "request_id": "01k9m0",
                }
            ]
        }
    )

    type: str = Field(description="Stable identifier of the kind of problem.")
    title: str
    status: int
    detail: str
    errors: list[FieldProblem]
    request_id: str


class Problem(Exception):  # noqa: N818, RFC 9457's own word
    """Base of all problems."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    retry_after: ClassVar[int | None] = None

    def __init__(self, detail: str, errors: list[FieldProblem] | None = None, pointer: str | None = None) -> None:
        super().__init__(detail)
        self.detail = clipped(detail)
        self.errors = errors or ([] if pointer is None else [FieldProblem(pointer=pointer, detail=detail)])

    @property
    def headers(self) -> dict[str, str]:
        """Headers the answer carries."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def document(self, request_id: str) -> dict[str, Any]:
        """Return the problem's body."""
        document = ProblemDocument(
            type=f"/problems/{self.slug}",
            title=self.title,
            status=self.status,
            detail=self.detail,
            errors=self.errors,
            request_id=request_id,
        )
        return document.model_dump()


class BadRequest(Problem):
    """The request is not valid HTTP for this service."""

    status, slug, title = 400, "bad-request", "Bad request"


class Unauthorized(Problem):
    """No API key was given, or one that is not known."""

    status, slug, title = 401, "unauthorized", "A valid API key is needed"

    @property
    def headers(self) -> dict[str, str]:
        """Name the scheme."""
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(Problem):
    """The key lacks the scope, or the caller is not on this machine."""

    status, slug, title = 403, "forbidden", "Not allowed"


class NotFound(Problem):
    """There is no such thing."""

    status, slug, title = 404, "not-found", "Not found"


class Gone(Problem):
    """The example was deleted; it never comes back."""

    status, slug, title = 410, "gone", "Deleted"


class MethodNotAllowed(Problem):
    """The path exists, with other methods."""

    status, slug, title = 405, "method-not-allowed", "Method not allowed"


class Conflict(Problem):
    """The state of things does not allow it now."""

    status, slug, title = 409, "conflict", "Conflict"


class NameTaken(Problem):
    """Something else has that name."""

    status, slug, title = 409, "name-taken", "Name taken"


class InUse(Problem):
    """Something else still refers to it."""

    status, slug, title = 409, "in-use", "Still in use"


class NotReady(Problem):
    """It is still being made, or its making failed."""

    status, slug, title = 409, "not-ready", "Not ready"


class RecipeMissing(Problem):
    """The model was registered without a recipe, so it cannot be trained again."""

    status, slug, title = 409, "recipe-missing", "The model has no recipe"


class IdempotencyInFlight(Problem):
    """The first request with this key has not finished."""

    status, slug, title, retry_after = 409, "idempotency-in-flight", "Request in flight", 1


class PayloadTooLarge(Problem):
    """The body is larger than the service accepts."""

    status, slug, title = 413, "payload-too-large", "Body too large"


class UnsupportedMedia(Problem):
    """The body's content type is another than the endpoint takes."""

    status, slug, title = 415, "unsupported-media-type", "Unsupported content type"


class InvalidRequest(Problem):
    """Fields, parameters or files are wrong; `errors` says which."""

    status, slug, title = 422, "invalid-request", "Invalid request"

    @classmethod
    def of_fields(cls, errors: list[FieldProblem]) -> Self:
        """Return the problem that these are, told by the first."""
        return cls(f"{errors[0].pointer or 'The body'}: {errors[0].detail}.", errors)


class InvalidCursor(Problem):
    """The cursor did not come from this list."""

    status, slug, title = 422, "invalid-cursor", "Invalid cursor"


class IdempotencyMismatch(Problem):
    """The key was used before with another request."""

    status, slug, title = 422, "idempotency-mismatch", "Idempotency key reused"


class EngineBusy(Problem):
    """More queries are waiting than the queue holds."""

    status, slug, title, retry_after = 429, "engine-busy", "Too many queries at once", 1


class InternalError(Problem):
    """A fault of the service; the request id finds it in the log."""


class CorruptArtifact(Problem):
    """A stored file is missing or damaged; the index or data set must be made again."""

    status, slug, title = 503, "corrupt-artifact", "Stored files are damaged"
    retry_after = 60


class EngineUnavailable(Problem):
    """The engine is starting, or died and is being restarted."""

    status, slug, title, retry_after = 503, "engine-unavailable", "Engine unavailable", 2


class DatabaseUnavailable(Problem):
    """The database does not answer."""

    status, slug, title, retry_after = 503, "database-unavailable", "Database unavailable", 2


class StorageFull(Problem):
    """There is no space left for the upload."""

    status, slug, title, retry_after = 507, "storage-full", "Storage full", 60


# What any operation can answer, whatever it does.
COMMON: tuple[type[Problem], ...] = (
    BadRequest,
    Unauthorized,
    Forbidden,
    InvalidRequest,
    InternalError,
    DatabaseUnavailable,
)
# What operations that take a body can answer beside, and those that ask the engine.
OF_BODIES: tuple[type[Problem], ...] = (IdempotencyInFlight, PayloadTooLarge, UnsupportedMedia)
OF_ENGINE: tuple[type[Problem], ...] = (EngineBusy, EngineUnavailable)


def problems(*types: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of an operation that can answer these problems beside the common ones."""
    by_status: dict[int, list[type[Problem]]] = {}
    every: list[type[Problem]] = list(dict.fromkeys([*COMMON, *types]))
    for kind in every:
        by_status.setdefault(kind.status, []).append(kind)
    return {
        status: {
            "model": ProblemDocument,
            "description": " · ".join(f"`{kind.slug}`: {(kind.__doc__ or '').strip()}" for kind in kinds),
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
        }
        for status, kinds in sorted(by_status.items())
    }
