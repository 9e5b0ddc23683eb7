"""Banks."""

from fastapi import APIRouter, Request

from app.banks import service
from app.banks.schemas import BankOut
from app.errors import InUse, NotFound, problems
from app.web.boundary import TransactionalRoute
from app.web.deps import PageDep, ResourcesDep, SessionDep, require
from app.web.effects import after_commit
from app.web.pagination import PageOf

router = APIRouter(prefix="/banks", tags=["replay"], route_class=TransactionalRoute)


@router.get("", summary="List banks", dependencies=[require("read")], responses=problems())
async def list_banks(session: SessionDep, page: PageDep) -> PageOf[BankOut]:
    """Return banks of retrainings, newest first."""
    return await service.page_of_banks(session, page)


@router.get("/{bank}", summary="Get a bank", dependencies=[require("read")], responses=problems(NotFound))
async def get_bank(session: SessionDep, bank: str) -> BankOut:
    """Return a bank: its protocol, how many retrainings it holds and how many diverged."""
    return await service.shown_bank(session, bank)


@router.delete(
    "/{bank}",
    summary="Delete a bank",
    status_code=204,
    dependencies=[require("write")],
    responses=problems(NotFound, InUse),
)
async def delete_bank(request: Request, session: SessionDep, resources: ResourcesDep, bank: str) -> None:
    """Delete a bank's retrainings and their files, unless an index is built on it. What was measured with it stays."""
    after_commit(request, await service.delete(session, bank, resources.artifacts))
