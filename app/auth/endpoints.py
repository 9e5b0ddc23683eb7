"""Who am I."""

from typing import Annotated

from fastapi import APIRouter

from app.auth.schemas import Me, Principal
from app.errors import problems
from app.web.boundary import TransactionalRoute
from app.web.deps import require

router = APIRouter(prefix="/me", tags=["keys"], route_class=TransactionalRoute)


@router.get("", summary="Who is asking", responses=problems())
async def get_me(principal: Annotated[Principal, require("read")]) -> Me:
    """Return the key that this request carries, and its scopes."""
    return Me(id=principal.id, name=principal.name, scopes=sorted(principal.scopes))
