"""What endpoints ask for."""

from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request, Security
from fastapi.security import HTTPBearer
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth.schemas import Principal, Scope
from app.errors import Forbidden
from app.web.pagination import MAX_LIMIT, Page
from app.web.resources import Resources, resources_of

# Only documents the scheme; the key itself is checked by the boundary, before anything else happens.
_bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey", description="`Authorization: Bearer hw_…`")


def _session(request: Request) -> AsyncSession:
    session: AsyncSession = request.state.session
    return session


SessionDep = Annotated[AsyncSession, Depends(_session)]
ResourcesDep = Annotated[Resources, Depends(resources_of)]


class Requirement:
    """Refuses callers without a scope; the boundary asks before it reads a body."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __call__(self, request: Request, _: Annotated[object, Security(_bearer)] = None) -> Principal:
        """Return who is asking.

        Raises:
            Forbidden: if the caller's key lacks the scope.
        """
        principal: Principal = request.state.principal
        if not principal.may(self.scope):
            raise Forbidden(f"This needs a key with the scope {self.scope!r}.")
        return principal


def require(scope: Scope) -> Any:
    """Return a dependency that refuses callers without a scope."""
    return Depends(Requirement(scope))


def page_of(
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Items per page.")] = 50,
    cursor: Annotated[str | None, Query(max_length=512, description="`next` of the page before.")] = None,
) -> Page:
    """Parse the paging parameters."""
    return Page(limit, cursor)


PageDep = Annotated[Page, Depends(page_of)]
IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", max_length=255, description="Makes a repeated request answer what the first did."),
]
PreferWait = Annotated[
    str | None, Header(alias="Prefer", description="`wait=N`: wait up to N ≤ 60 s for the job to finish.")
]


async def release(session: AsyncSession) -> None:
    """Give the connection back before a long wait; what was loaded stays readable."""
    await session.close()
