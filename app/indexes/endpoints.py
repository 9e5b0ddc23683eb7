"""Methods and indexes."""

from fastapi import APIRouter, Request, Response

from app.db.tables import Job
from app.errors import (
    OF_BODIES,
    Conflict,
    CorruptArtifact,
    IdempotencyInFlight,
    InUse,
    NameTaken,
    NotFound,
    NotReady,
    PayloadTooLarge,
    RecipeMissing,
    problems,
)
from app.indexes import creation, generations, service
from app.indexes.schemas import ExtensionCreate, IndexCreate, IndexOut, Methods, QualityOut
from app.jobs.schemas import JobOut
from app.jobs.service import shown as shown_job
from app.web.boundary import TransactionalRoute
from app.web.deps import IdempotencyKey, PageDep, PreferWait, ResourcesDep, SessionDep, require
from app.web.effects import after_commit
from app.web.pagination import PageOf

router = APIRouter(tags=["indexes"], route_class=TransactionalRoute)


def _submitted(response: Response, job: Job) -> JobOut:
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return shown_job(job)


@router.get("/methods", summary="List methods", dependencies=[require("read")], responses=problems())
async def list_methods() -> Methods:
    """Return every method: its parameters, what notion of attribution it answers, what it needs, and where it is from."""
    return Methods(items=service.methods())


@router.post(
    "/indexes",
    summary="Fit an index",
    status_code=202,
    response_model=JobOut,
    dependencies=[require("write")],
    responses={
        200: {"model": IndexOut, "description": "The fitted index, with `Prefer: wait`."},
        **problems(NotFound, NotReady, RecipeMissing, NameTaken, *OF_BODIES, CorruptArtifact),
    },
)
async def create_index(
    response: Response,
    session: SessionDep,
    resources: ResourcesDep,
    index: IndexCreate,
    _key: IdempotencyKey = None,
    _prefer: PreferWait = None,
) -> JobOut:
    """Fit a method to a model's checkpoints and its training set.

    The fit runs in deterministic shards on the workers; the index appears when every byte of it is published.
    """
    _, job = await creation.create(session, index, resources)
    return _submitted(response, job)


@router.get("/indexes", summary="List indexes", dependencies=[require("read")], responses=problems())
async def list_indexes(session: SessionDep, page: PageDep) -> PageOf[IndexOut]:
    """Return indexes, newest first."""
    return await service.list_indexes(session, page)


@router.get("/indexes/{index}", summary="Get an index", dependencies=[require("read")], responses=problems(NotFound))
async def get_index(session: SessionDep, index: str) -> IndexOut:
    """Return an index by id or name: status, fingerprint, coverage, bytes, timings, quality."""
    return service.shown(await service.find(session, index))


@router.delete(
    "/indexes/{index}",
    summary="Delete an index",
    status_code=204,
    dependencies=[require("write")],
    responses=problems(NotFound, InUse),
)
async def delete_index(request: Request, session: SessionDep, resources: ResourcesDep, index: str) -> None:
    """Delete an index and its files."""
    after_commit(request, await service.delete(session, index, resources.artifacts))


@router.post(
    "/indexes/{index}/extensions",
    summary="Extend an index",
    status_code=202,
    response_model=JobOut,
    dependencies=[require("write")],
    responses={
        200: {"model": IndexOut, "description": "The extended index, with `Prefer: wait`."},
        **problems(NotFound, NotReady, Conflict, *OF_BODIES, CorruptArtifact),
    },
)
async def create_extension(
    response: Response,
    session: SessionDep,
    resources: ResourcesDep,
    index: str,
    extension: ExtensionCreate,
    _key: IdempotencyKey = None,
    _prefer: PreferWait = None,
) -> JobOut:
    """Take in the examples that a later version of the data set appends: only they are computed, factors and stored rows are kept.

    The index switches to the new generation when all of it is published; until then the one before answers. `drift` says how far the
    kept factors are from the new examples.
    """
    _, job = await generations.extend(session, index, extension.dataset, resources.settings, resources.artifacts)
    return _submitted(response, job)


@router.post(
    "/indexes/{index}/refresh",
    summary="Refresh an index",
    status_code=202,
    response_model=JobOut,
    dependencies=[require("write")],
    responses={
        200: {"model": IndexOut, "description": "The refreshed index, with `Prefer: wait`."},
        **problems(NotFound, NotReady, Conflict, IdempotencyInFlight, PayloadTooLarge, CorruptArtifact),
    },
)
async def refresh_index(
    response: Response,
    session: SessionDep,
    resources: ResourcesDep,
    index: str,
    _key: IdempotencyKey = None,
    _prefer: PreferWait = None,
) -> JobOut:
    """Fit everything anew to the index's data set, without its deleted examples; the generation before answers until that is published."""
    _, job = await generations.refresh(session, index, resources.settings, resources.artifacts)
    return _submitted(response, job)


@router.get(
    "/indexes/{index}/quality",
    summary="Get an index's quality",
    dependencies=[require("read")],
    responses=problems(NotFound),
)
async def get_quality(session: SessionDep, index: str) -> QualityOut:
    """Return what was measured for this index against real retraining; null until an evaluation has run."""
    found = await service.find(session, index)
    return QualityOut(index=found.id, quality=found.quality)
