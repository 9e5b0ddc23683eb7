"""Registering models, and accepting checkpoints that fit them."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.failures import is_duplicate
from app.db.ids import new_id
from app.db.tables import Checkpoint, Model
from app.engine.client import EngineClient
from app.errors import Conflict, FieldProblem, InUse, InvalidRequest, NameTaken, NotFound
from app.jobs import service as jobs
from app.models import repository
from app.models.schemas import ArchitectureOut, CheckpointMeta, CheckpointOut, CheckpointSource, ModelCreate, ModelOut
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from app.storage.roots import resolve
from app.web.pagination import Page, PageOf, cut
from attribution_core.architectures.registry import ARCHITECTURES, describe_architectures, parse_arguments
from attribution_core.fingerprint import sha256_of
from attribution_core.training.recipe import CheckpointInitialisation, Recipe
from attribution_core.weights import WeightsSummary, check_weights

WEIGHTS_FILE = "weights.safetensors"
CHECKPOINTS = "checkpoints"


async def architectures(engine: EngineClient) -> list[ArchitectureOut]:
    """Return the built-in architectures, and those that installed packages add."""
    plugins: list[dict[str, Any]] = (await engine.call("describe_plugins", {}))["plugins"]
    return [ArchitectureOut(**entry) for entry in [*describe_architectures(), *plugins]]


async def create(session: AsyncSession, engine: EngineClient, settings: Settings, request: ModelCreate) -> Model:
    """Register a model.

    Raises:
        InvalidRequest: if the architecture is unknown, or the arguments or the task do not fit it.
        NameTaken: if a model of that name exists.
    """
    _check(request, settings)
    await session.close()  # nothing is read yet; the engine may take its time
    described = await engine.call("describe_model", {"architecture": request.architecture.model_dump(mode="json")})
    await _check_initialisation(session, request.recipe, described["parameters"])
    model = Model(
        id=new_id("mdl"),
        name=request.name,
        architecture=request.architecture.model_dump(mode="json"),
        task=request.task.model_dump(mode="json"),
        tokenizer=request.tokenizer.model_dump(mode="json") if request.tokenizer else None,
        recipe=request.recipe.model_dump(mode="json") if request.recipe else None,
        user_metadata=request.metadata,
        parameters=described["parameters"],
        num_parameters=described["num_parameters"],
    )
    session.add(model)
    try:
        await session.flush()
    except IntegrityError:
        raise NameTaken(f"There is a model {request.name!r} already.", pointer="/name") from None
    await session.refresh(model)
    return model


async def find(session: AsyncSession, reference: str, *, lock: bool = False, keep: bool = False) -> Model:
    """Return a model by id or name.

    Raises:
        NotFound: if there is none.
    """
    model = await repository.find(session, reference, lock=lock, keep=keep)
    if model is None:
        raise NotFound(f"There is no model {reference[:64]!r}.")
    return model


async def list_models(session: AsyncSession, page: Page) -> PageOf[ModelOut]:
    """Return one page of models, newest first."""
    rows, following = cut(await repository.page(session, page), page, "models")
    return PageOf[ModelOut](items=[shown(row) for row in rows], next=following)


async def delete(session: AsyncSession, reference: str, artifacts: ArtifactStore) -> Callable[[], None]:
    """Delete a model and its checkpoints; returns what removes their files once that is committed.

    Raises:
        InUse: if an index was fitted to it, a job needs it, or another model's recipe starts from one of its checkpoints.
    """
    model = await find(session, reference, lock=True)
    await jobs.refuse_if_needed(session, model)
    starting = await repository.recipe_starting_from(session, model.id)
    if starting is not None:
        raise InUse(f"The recipe of model {starting!r} starts from a checkpoint of this one; delete that model first.")
    names = [checkpoint.artifact for checkpoint in await repository.checkpoints(session, model.id)]
    await session.delete(model)
    try:
        await session.flush()
    except IntegrityError:
        raise InUse("An index was fitted to this model; delete the index first.") from None

    banks = bank_folder(model.id)

    def remove() -> None:
        for name in (*names, banks):
            artifacts.delete(name)

    return remove


async def add_checkpoint(
    session: AsyncSession, artifacts: ArtifactStore, model: Model, meta: CheckpointMeta, file: Path
) -> Checkpoint:
    """Check a weights file that was uploaded against its model and publish it.

    Raises:
        InvalidRequest: with every problem of the file.
        Conflict: if the model has a checkpoint of that run and step.
    """
    checkpoint_id = new_id("ckpt")
    summary = await asyncio.to_thread(check_weights, file, model.parameters)
    checkpoint = await register_checkpoint(session, model.id, meta, checkpoint_id, summary, "uploaded")
    await asyncio.to_thread(publish_checkpoint, artifacts, checkpoint_id, file)
    return checkpoint


async def register_checkpoint(
    session: AsyncSession,
    model_id: str,
    meta: CheckpointMeta,
    checkpoint_id: str,
    summary: WeightsSummary,
    source: CheckpointSource,
) -> Checkpoint:
    """Add the row of a checkpoint whose weights were checked.

    Raises:
        Conflict: if the model has a checkpoint of that run and step.
    """
    checkpoint = Checkpoint(
        id=checkpoint_id,
        model_id=model_id,
        **meta.model_dump(),
        sha256=summary.sha256,
        bytes=summary.bytes,
        dtype=summary.dtype,
        artifact=_artifact_of(checkpoint_id),
        source=source,
    )
    session.add(checkpoint)
    try:
        await session.flush()
    except IntegrityError as error:
        if not is_duplicate(error):
            raise
        raise Conflict(
            f"The model has a checkpoint of run {meta.run!r} at step {meta.step}.", pointer="/meta"
        ) from None
    await session.refresh(checkpoint)
    return checkpoint


def stable_checkpoint_id(maker: str, *parts: object) -> str:
    """Return an id that every attempt of a job comes to, so that a repeated publication is the same one."""
    return f"ckpt_{sha256_of([maker, *map(str, parts)])[:26]}"


def publish_checkpoint(artifacts: ArtifactStore, checkpoint_id: str, file: Path) -> None:
    """Move a weights file to where a checkpoint's are."""
    folder = artifacts.workspace(checkpoint_id)
    file.rename(folder / WEIGHTS_FILE)
    artifacts.publish(folder, _artifact_of(checkpoint_id))


async def named_artifacts(session: AsyncSession, names: Sequence[str]) -> set[str]:
    """Return which artifacts are checkpoints'."""
    return await repository.named_artifacts(session, names)


async def runs(session: AsyncSession, model_id: str) -> set[str]:
    """Return the runs that a model has checkpoints of."""
    return await repository.runs(session, model_id)


async def any_checkpoint(session: AsyncSession, checkpoint_id: str) -> Checkpoint:
    """Return a checkpoint of whatever model.

    Raises:
        NotFound: if there is none.
    """
    checkpoint = await repository.any_checkpoint(session, checkpoint_id)
    if checkpoint is None:
        raise NotFound(f"There is no checkpoint {checkpoint_id[:64]!r}.")
    return checkpoint


def bank_folder(model_id: str) -> str:
    """Return where the banks of a model's retrainings are."""
    return f"banks/{model_id}"


async def list_checkpoints(session: AsyncSession, model: Model, page: Page) -> PageOf[CheckpointOut]:
    """Return one page of a model's checkpoints, newest first."""
    route = f"checkpoints:{model.id}"
    rows, following = cut(await repository.checkpoint_page(session, model.id, page, route), page, route)
    return PageOf[CheckpointOut](items=[shown_checkpoint(row) for row in rows], next=following)


async def find_checkpoint(session: AsyncSession, model: Model, checkpoint_id: str) -> Checkpoint:
    """Return one checkpoint of a model.

    Raises:
        NotFound: if there is none.
    """
    checkpoint = await repository.checkpoint(session, model.id, checkpoint_id)
    if checkpoint is None:
        raise NotFound(f"Model {model.name!r} has no checkpoint {checkpoint_id[:64]!r}.")
    return checkpoint


async def chosen_checkpoints(session: AsyncSession, model: Model, choice: str | Sequence[str]) -> list[Checkpoint]:
    """Return the checkpoints that `final`, `all` or a list of ids names, by run and step.

    What was unlearned is no training of the model: `final` and `all` leave it out, its id takes it.

    Raises:
        InvalidRequest: if that is none, or an id is not one of the model's.
    """
    every = list(await repository.checkpoints(session, model.id))
    if isinstance(choice, str):
        own = [checkpoint for checkpoint in every if checkpoint.source != "unlearned"]
        chosen = [checkpoint for checkpoint in own if choice == "all" or checkpoint.final]
        if not chosen:
            raise InvalidRequest(f"Model {model.name!r} has no such checkpoints yet.", pointer="/checkpoints")
        return chosen
    known = {checkpoint.id for checkpoint in every}
    unknown = [
        FieldProblem(pointer=f"/checkpoints/{n}", detail="not a checkpoint of this model")
        for n, i in enumerate(choice)
        if i not in known
    ]
    unknown += [
        FieldProblem(pointer=f"/checkpoints/{n}", detail="named twice") for n, i in enumerate(choice) if i in choice[:n]
    ]
    if unknown:
        raise InvalidRequest(f"`checkpoints` names one twice, or one that model {model.name!r} does not have.", unknown)
    return [checkpoint for checkpoint in every if checkpoint.id in choice]


async def checkpoints_by_id(session: AsyncSession, model_id: str, ids: Sequence[str]) -> list[Checkpoint]:
    """Return checkpoints in the order of their ids given."""
    found = {checkpoint.id: checkpoint for checkpoint in await repository.checkpoints(session, model_id)}
    return [found[checkpoint_id] for checkpoint_id in ids]


def shown(model: Model) -> ModelOut:
    """Return a model as clients see it."""
    return ModelOut(
        id=model.id,
        name=model.name,
        architecture=model.architecture,
        task=model.task,
        tokenizer=model.tokenizer,
        recipe=model.recipe,
        metadata=model.user_metadata,
        parameters=model.parameters,
        num_parameters=model.num_parameters,
        created_at=model.created_at,
    )


def shown_checkpoint(checkpoint: Checkpoint) -> CheckpointOut:
    """Return a checkpoint as clients see it."""
    names = set(CheckpointOut.model_fields) - {"model"}
    return CheckpointOut(model=checkpoint.model_id, **{name: getattr(checkpoint, name) for name in names})


def _check(request: ModelCreate, settings: Settings) -> None:
    entry = ARCHITECTURES.get(request.architecture.name)
    if entry is not None:
        parse_arguments(request.architecture)
        if request.task.type not in entry.tasks:
            allowed = ", ".join(entry.tasks)
            raise InvalidRequest(
                f"{request.architecture.name} is for {allowed}, not {request.task.type}.", pointer="/task/type"
            )
    if request.tokenizer is not None and request.tokenizer.source is not None:
        resolve(settings.roots, request.tokenizer.source, "/tokenizer/source")


async def _check_initialisation(session: AsyncSession, recipe: Recipe | None, parameters: dict[str, Any]) -> None:
    """Refuse a recipe that starts from a checkpoint of another architecture; that one's model stays until the recipe is there."""
    if recipe is None or not isinstance(recipe.initialisation, CheckpointInitialisation):
        return
    pointer = "/recipe/initialisation/checkpoint"
    checkpoint = await repository.any_checkpoint(session, recipe.initialisation.checkpoint)
    if checkpoint is None:
        raise InvalidRequest(f"There is no checkpoint {recipe.initialisation.checkpoint!r}.", pointer=pointer)
    if (await find(session, checkpoint.model_id, keep=True)).parameters != parameters:
        raise InvalidRequest("The checkpoint is of another architecture.", pointer=pointer)


def _artifact_of(checkpoint_id: str) -> str:
    return f"{CHECKPOINTS}/{checkpoint_id}"
