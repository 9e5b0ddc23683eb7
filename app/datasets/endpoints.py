"""Data sets: import, list, look at, delete."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from pydantic import BaseModel

from app.datasets import examples, service
from app.datasets.schemas import DatasetOut, DeletionCreate, DeletionOut, ExampleOut, VersionCreate
from app.errors import (
    OF_BODIES,
    CorruptArtifact,
    Gone,
    InUse,
    NameTaken,
    NotFound,
    NotReady,
    StorageFull,
    UnsupportedMedia,
    problems,
)
from app.jobs.schemas import JobOut
from app.jobs.service import shown as shown_job
from app.web.boundary import TransactionalRoute
from app.web.content import is_form, is_json
from app.web.deps import IdempotencyKey, PageDep, PreferWait, ResourcesDep, SessionDep, require
from app.web.effects import after_commit, undo_on_error
from app.web.pagination import PageOf
from app.web.resources import Resources
from app.web.uploads import form_of, json_part, saved_file, validated
from attribution_core.spec import DatasetSpec

router = APIRouter(prefix="/datasets", tags=["datasets"], route_class=TransactionalRoute)
M = TypeVar("M", bound=BaseModel)
Row = Annotated[int, PathParameter(ge=0, le=2**53, description="Row number, from 0.")]
_SPEC = DatasetSpec.model_json_schema()
_EXAMPLE = {
    "name": "mnist-train",
    "kind": "image",
    "input": "image",
    "target": "label",
    "metadata": ["source"],
    "source": "imports:mnist.parquet",
}


def _body(schema: dict[str, Any], spec: str, title: str, example: dict[str, Any]) -> dict[str, Any]:
    """Describe a body that is a file with its spec, or a spec that names a source."""
    parts = {
        "type": "object",
        "required": ["file", "spec"],
        "additionalProperties": False,
        "properties": {
            "file": {"type": "string", "format": "binary", "description": "parquet, jsonl, csv or npz."},
            "spec": {"type": "string", "description": spec},
        },
    }
    form = {"schema": parts, "encoding": {"spec": {"contentType": "text/plain"}}}
    named = {"schema": schema, "examples": {title: {"value": example}}}
    content = {"multipart/form-data": form, "application/json": named}
    return {"requestBody": {"required": True, "content": content}}


async def _sent(request: Request, resources: Resources, model: type[M]) -> tuple[M, tuple[Path, str] | None]:
    """Return a request's spec, and the uploaded file under a name of ours with the client's name for it."""
    if is_form(request.headers):
        form = await form_of(request, "file", "spec")
        spec = json_part(form, "spec", model)
        async with saved_file(form, resources.uploads) as (path, name):
            kept = path.with_suffix(".data")
            path.rename(kept)
            undo_on_error(request, lambda: kept.unlink(missing_ok=True))
        return spec, (kept, name)
    if not is_json(request.headers):
        raise UnsupportedMedia("This endpoint takes multipart/form-data or application/json.")
    return validated(model, await request.json() if await request.body() else None), None


@router.post(
    "",
    summary="Import a data set",
    status_code=202,
    response_model=JobOut,
    dependencies=[require("write")],
    openapi_extra=_body(_SPEC, "A data set spec as JSON text.", "from a root", _EXAMPLE),
    responses={
        200: {"model": DatasetOut, "description": "The imported data set, with `Prefer: wait`."},
        **problems(NameTaken, *OF_BODIES, StorageFull),
    },
)
async def create_dataset(
    request: Request,
    response: Response,
    session: SessionDep,
    resources: ResourcesDep,
    _key: IdempotencyKey = None,
    _prefer: PreferWait = None,
) -> JobOut:
    """Import a file as an immutable, content-hashed data set.

    Send the file as multipart with a JSON `spec`, or only the spec with a `source` under a configured root. Every row is checked; if any
    has a problem nothing is imported and the data set's `error` lists the first hundred with their row numbers.
    """
    spec, upload = await _sent(request, resources, DatasetSpec)
    _, job = await service.create(session, spec, resources.settings, upload)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return shown_job(job)


@router.post(
    "/{dataset}/versions",
    summary="Append examples",
    status_code=202,
    response_model=JobOut,
    dependencies=[require("write")],
    openapi_extra=_body(
        VersionCreate.model_json_schema(),
        "A version as JSON text, `{}` if there is nothing to say.",
        "from a root",
        {"source": "imports:more.parquet"},
    ),
    responses={
        200: {"model": DatasetOut, "description": "The new version, with `Prefer: wait`."},
        **problems(NotFound, NotReady, NameTaken, *OF_BODIES, StorageFull, CorruptArtifact),
    },
)
async def create_version(
    request: Request,
    response: Response,
    session: SessionDep,
    resources: ResourcesDep,
    dataset: str,
    _key: IdempotencyKey = None,
    _prefer: PreferWait = None,
) -> JobOut:
    """Import a file's rows after those of a data set, as a new immutable data set: its next version.

    Rows of the parent keep their numbers; the new rows must have the same columns of the same types. The parent stays as it is.
    """
    spec, upload = await _sent(request, resources, VersionCreate)
    _, job = await service.create_version(session, dataset, spec, resources.settings, upload)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return shown_job(job)


@router.post(
    "/{dataset}/deletions",
    summary="Delete examples",
    dependencies=[require("write")],
    responses=problems(NotFound, NotReady, *OF_BODIES, CorruptArtifact),
)
async def delete_examples(
    session: SessionDep,
    resources: ResourcesDep,
    dataset: str,
    deletion: DeletionCreate,
    _key: IdempotencyKey = None,
) -> DeletionOut:
    """Delete examples from a data set and from every version that holds them; they are gone from all answers at once, for good.

    Fits from now on leave them out; indexes that there are keep their factors until they are refreshed.
    """
    return await examples.delete_examples(session, resources.artifacts, dataset, deletion.selector)


@router.get("", summary="List data sets", dependencies=[require("read")], responses=problems())
async def list_datasets(session: SessionDep, page: PageDep) -> PageOf[DatasetOut]:
    """Return data sets, newest first."""
    return await service.list_datasets(session, page)


@router.get("/{dataset}", summary="Get a data set", dependencies=[require("read")], responses=problems(NotFound))
async def get_dataset(session: SessionDep, dataset: str) -> DatasetOut:
    """Return a data set by id or name, with the report of its import."""
    return await service.shown(session, await service.find(session, dataset))


@router.delete(
    "/{dataset}",
    summary="Delete a data set",
    status_code=204,
    dependencies=[require("write")],
    responses=problems(NotFound, InUse),
)
async def delete_dataset(request: Request, session: SessionDep, resources: ResourcesDep, dataset: str) -> None:
    """Delete a data set and its files, unless an index refers to it."""
    after_commit(request, await service.delete(session, dataset, resources.artifacts, resources.uploads))


@router.get(
    "/{dataset}/examples",
    summary="List examples",
    dependencies=[require("read")],
    responses=problems(NotFound, NotReady, CorruptArtifact),
)
async def list_examples(
    session: SessionDep,
    resources: ResourcesDep,
    page: PageDep,
    dataset: str,
    filter: Annotated[  # noqa: A002, the contract's name
        str | None,
        Query(
            max_length=8192,
            description='A filter as JSON, e.g. `{"field": "target", "op": "eq", "value": 3}`.',
            examples=['{"field": "target", "op": "eq", "value": 3}'],
        ),
    ] = None,
) -> PageOf[ExampleOut]:
    """Return examples by row, optionally those that a filter selects."""
    found = await service.find_ready(session, dataset)
    return await examples.examples(session, resources.artifacts, found, page, filter)


@router.get(
    "/{dataset}/examples/{row}",
    summary="Get an example",
    dependencies=[require("read")],
    responses=problems(NotFound, Gone, NotReady, CorruptArtifact),
)
async def get_example(session: SessionDep, resources: ResourcesDep, dataset: str, row: Row) -> ExampleOut:
    """Return one example's id, target and metadata."""
    return await examples.example(session, resources.artifacts, await service.find_ready(session, dataset), row)


@router.get(
    "/{dataset}/examples/{row}/preview",
    summary="Look at an example",
    dependencies=[require("read")],
    response_class=Response,
    responses={
        200: {"content": {"image/png": {}, "text/plain": {}}, "description": "A picture of an image, text otherwise."},
        **problems(NotFound, Gone, NotReady, CorruptArtifact),
    },
)
async def preview_example(session: SessionDep, resources: ResourcesDep, dataset: str, row: Row) -> Response:
    """Return the input as a PNG for images, as plain text otherwise. Browsers are told to run nothing in it."""
    preview = await examples.preview(session, resources.artifacts, await service.find_ready(session, dataset), row)
    headers = {"Content-Security-Policy": "default-src 'none'; sandbox", "Content-Disposition": "inline"}
    return Response(preview.content, media_type=preview.media_type, headers=headers)
