"""Architectures, models and checkpoints."""

from typing import Any

from fastapi import APIRouter, Request, Response

from app.errors import OF_BODIES, OF_ENGINE, Conflict, InUse, NameTaken, NotFound, StorageFull, problems
from app.models import service
from app.models.schemas import Architectures, CheckpointMeta, CheckpointOut, ModelCreate, ModelOut
from app.web.boundary import TransactionalRoute
from app.web.deps import IdempotencyKey, PageDep, ResourcesDep, SessionDep, release, require
from app.web.effects import after_commit, undo_on_error
from app.web.pagination import PageOf
from app.web.uploads import form_of, json_part, saved_file

router = APIRouter(tags=["models"], route_class=TransactionalRoute)
_CHECKPOINT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "meta"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "safetensors weights."},
                        "meta": {"type": "string", "description": "Where in training it was taken, as JSON text."},
                    },
                },
                "encoding": {"meta": {"contentType": "text/plain"}},
                "examples": {"final": {"value": {"meta": '{"run": "seed-0", "step": 504, "final": true}'}}},
            }
        },
    }
}


@router.get(
    "/architectures", summary="List architectures", dependencies=[require("read")], responses=problems(*OF_ENGINE)
)
async def list_architectures(session: SessionDep, resources: ResourcesDep) -> Architectures:
    """Return every allowed architecture with the JSON Schema of its arguments. Installed packages may add some."""
    await session.close()
    return Architectures(items=await service.architectures(resources.engine))


@router.post(
    "/models",
    summary="Register a model",
    status_code=201,
    dependencies=[require("write")],
    responses=problems(NameTaken, *OF_BODIES, *OF_ENGINE),
)
async def create_model(
    response: Response, session: SessionDep, resources: ResourcesDep, model: ModelCreate, _: IdempotencyKey = None
) -> ModelOut:
    """Register an architecture with a task. The answer lists the parameters that its checkpoints must have."""
    created = await service.create(session, resources.engine, resources.settings, model)
    response.headers["Location"] = f"/v1/models/{created.id}"
    return service.shown(created)


@router.get("/models", summary="List models", dependencies=[require("read")], responses=problems())
async def list_models(session: SessionDep, page: PageDep) -> PageOf[ModelOut]:
    """Return models, newest first."""
    return await service.list_models(session, page)


@router.get("/models/{model}", summary="Get a model", dependencies=[require("read")], responses=problems(NotFound))
async def get_model(session: SessionDep, model: str) -> ModelOut:
    """Return a model by id or name."""
    return service.shown(await service.find(session, model))


@router.delete(
    "/models/{model}",
    summary="Delete a model",
    status_code=204,
    dependencies=[require("write")],
    responses=problems(NotFound, InUse),
)
async def delete_model(request: Request, session: SessionDep, resources: ResourcesDep, model: str) -> None:
    """Delete a model with its checkpoints, unless an index refers to it."""
    after_commit(request, await service.delete(session, model, resources.artifacts))


@router.post(
    "/models/{model}/checkpoints",
    summary="Upload a checkpoint",
    status_code=201,
    dependencies=[require("write")],
    openapi_extra=_CHECKPOINT_BODY,
    responses=problems(NotFound, Conflict, *OF_BODIES, StorageFull),
)
async def create_checkpoint(
    request: Request,
    response: Response,
    session: SessionDep,
    resources: ResourcesDep,
    model: str,
    _: IdempotencyKey = None,
) -> CheckpointOut:
    """Upload safetensors weights. Anything else is refused by its first bytes, whatever its name.

    Names, shapes, dtypes and finiteness are checked against the model, and every problem is listed at once.
    """
    found = await service.find(session, model)
    await release(session)  # the body may take its time
    form = await form_of(request, "file", "meta")
    meta = json_part(form, "meta", CheckpointMeta)
    async with saved_file(form, resources.uploads) as (path, _name):
        created = await service.add_checkpoint(session, resources.artifacts, found, meta, path)
    undo_on_error(request, lambda: resources.artifacts.delete(created.artifact))
    response.headers["Location"] = f"/v1/models/{found.id}/checkpoints/{created.id}"
    return service.shown_checkpoint(created)


@router.get(
    "/models/{model}/checkpoints",
    summary="List checkpoints",
    dependencies=[require("read")],
    responses=problems(NotFound),
)
async def list_checkpoints(session: SessionDep, page: PageDep, model: str) -> PageOf[CheckpointOut]:
    """Return a model's checkpoints, newest first."""
    return await service.list_checkpoints(session, await service.find(session, model), page)


@router.get(
    "/models/{model}/checkpoints/{checkpoint}",
    summary="Get a checkpoint",
    dependencies=[require("read")],
    responses=problems(NotFound),
)
async def get_checkpoint(session: SessionDep, model: str, checkpoint: str) -> CheckpointOut:
    """Return one checkpoint of a model."""
    return service.shown_checkpoint(
        await service.find_checkpoint(session, await service.find(session, model), checkpoint)
    )
