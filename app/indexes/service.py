"""Indexes that there are: finding and showing them, what a worker needs to know of one, and what it reports."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.banks import service as banks
from app.datasets import service as datasets
from app.db.tables import Checkpoint, Dataset, Index, IndexGeneration, Job, Model
from app.errors import InUse, InvalidRequest, NotFound, NotReady
from app.indexes import repository
from app.indexes.schemas import IndexOut, MethodOut
from app.jobs import service as jobs
from app.models import service as models
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from app.storage.roots import resolve
from app.web.pagination import Page, PageOf, cut
from attribution_core.architectures.registry import ARCHITECTURES
from attribution_core.fit_spec import CheckpointRef, FitSpec, PriorRef
from attribution_core.method_spec import (
    METHODS,
    OFFERED,
)
from attribution_core.spec import TokenizerSpec
from attribution_core.training.spec import Protocol


def methods() -> list[MethodOut]:
    """Return every method with the JSON Schema of its parameters."""
    return [
        MethodOut(
            type=name,
            description=(method.__doc__ or "").strip(),
            notion=method.notion,
            needs=list(method.needs),
            query_cost=method.query_cost,
            estimators=list(method.estimators),
            self_influence=method.self_influence,
            extends=method.extends,
            reference=method.reference,
            parameters=method.model_json_schema(),
        )
        for name, method in OFFERED.items()
    ]


def check_fits(model: Model, dataset: Dataset, pointer: str = "/dataset") -> None:
    """Refuse a data set whose kind, shape or targets the model cannot take.

    Raises:
        InvalidRequest: saying which.
    """
    kind, task = dataset.spec["kind"], model.task["type"]
    entry = ARCHITECTURES.get(model.architecture["name"])
    if entry is not None and kind not in entry.kinds:
        raise InvalidRequest(
            f"A {model.architecture['name']} reads {', '.join(entry.kinds)} data, not {kind}.", pointer=pointer
        )
    if kind == "text" and model.tokenizer is None:
        raise InvalidRequest("A text data set needs a model with a tokenizer.", pointer=pointer)
    wanted = {"classification": ("class",), "regression": ("class", "real", "vector")}.get(task)
    if wanted is not None and dataset.target_type not in wanted:
        raise InvalidRequest(
            f"A {task} model needs {' or '.join(wanted)} targets; these are {dataset.target_type}.", pointer=pointer
        )
    shape = model.architecture["arguments"].get("input_shape")
    if shape is not None and dataset.input_shape != shape:
        raise InvalidRequest(
            f"The model takes inputs of shape {shape}, the data set has {dataset.input_shape}.", pointer=pointer
        )
    flat = model.architecture["arguments"].get("input_dim") if entry is not None else None
    if flat is not None and dataset.input_shape is not None and flat != _product(dataset.input_shape):
        raise InvalidRequest(
            f"The model takes {flat} inputs, the data set has {_product(dataset.input_shape)}.", pointer=pointer
        )
    classes = model.architecture["arguments"].get("num_classes") if entry is not None else None
    if task == "classification" and classes is not None and (dataset.num_classes or 0) > classes:
        raise InvalidRequest(f"The model has {classes} classes, the data set {dataset.num_classes}.", pointer=pointer)


def check_deletions(spec: FitSpec) -> None:
    """Refuse methods that repeat a training on the whole data set, where examples of it were deleted.

    Raises:
        InvalidRequest: saying so.
    """
    if spec.left_out and "recipe" in spec.method.needs:
        raise InvalidRequest(
            f"{spec.method.type} repeats a training on every example, and {len(spec.left_out)} of this data set were deleted: "
            "import it without them.",
            pointer="/dataset",
        )


async def find(session: AsyncSession, reference: str, *, lock: bool = False, keep: bool = False) -> Index:
    """Return an index by id or name.

    Raises:
        NotFound: if there is none.
    """
    index = await repository.find(session, reference, lock=lock, keep=keep)
    if index is None:
        raise NotFound(f"There is no index {reference[:64]!r}.")
    return index


async def find_ready(session: AsyncSession, reference: str, *, lock: bool = False, keep: bool = False) -> Index:
    """Return a fitted index, kept from being deleted until the transaction ends where asked.

    Raises:
        NotFound: if there is none.
        NotReady: if it is being fitted, or its fit failed.
    """
    index = await find(session, reference, lock=lock, keep=keep)
    if index.status != "ready":
        raise NotReady(f"Index {index.name!r} is {index.status}; see its job {index.job_id}.")
    return index


async def list_indexes(session: AsyncSession, page: Page) -> PageOf[IndexOut]:
    """Return one page of indexes, newest first."""
    rows, following = cut(await repository.page(session, page), page, "indexes")
    return PageOf[IndexOut](items=[shown(row) for row in rows], next=following)


async def delete(session: AsyncSession, reference: str, artifacts: ArtifactStore) -> Callable[[], None]:
    """Delete an index; returns what removes its files once that is committed.

    Raises:
        InUse: if it or its next generation is being fitted, or a job or another index needs it.
    """
    index = await find(session, reference, lock=True)
    building = index.pending["job"] if index.pending and index.pending["status"] == "building" else None
    if index.status == "fitting" or building is not None:
        raise InUse(f"The index is being fitted; cancel its job {building or index.job_id} first.")
    await jobs.refuse_if_needed(session, index)
    # A job that was stopped after publishing leaves files that no row names.
    last = max(await repository.generation_numbers(session, index.id))
    names = [artifact_name(index.id, number) for number in range(1, last + 1)]
    job_ids = [index.job_id, index.pending["job"] if index.pending else None]
    await session.delete(index)
    try:
        await session.flush()
    except IntegrityError:
        raise InUse("Another index is built on this one; delete that first.") from None

    def remove() -> None:
        for name in names:
            artifacts.delete(name)
        for job_id in filter(None, job_ids):
            artifacts.drop_workspace(job_id)

    return remove


async def fit_spec(session: AsyncSession, reference: str, settings: Settings, artifacts: ArtifactStore) -> FitSpec:
    """Return everything that the generation of an index which answers depends on."""
    index = await find(session, reference)
    return await spec_of(session, index, await answering(session, index), settings, artifacts)


async def answering(session: AsyncSession, index: Index) -> IndexGeneration:
    """Return the generation of an index that answers.

    Raises:
        NotFound: if the index was deleted meanwhile.
    """
    generation = await repository.generation(session, index.id, index.generation)
    if generation is None:
        raise NotFound(f"Index {index.name!r} was deleted.")
    return generation


async def spec_of(
    session: AsyncSession, index: Index, generation: IndexGeneration, settings: Settings, artifacts: ArtifactStore
) -> FitSpec:
    """Return everything that a generation of an index depends on."""
    model = await models.find(session, index.model_id)
    dataset = await datasets.find_ready(session, generation.dataset_id)
    checkpoints = await models.checkpoints_by_id(session, model.id, index.checkpoint_ids)
    return await spec_over(session, index, generation, model, dataset, checkpoints, settings, artifacts)


async def spec_over(
    session: AsyncSession,
    index: Index,
    generation: IndexGeneration,
    model: Model,
    dataset: Dataset,
    checkpoints: list[Checkpoint],
    settings: Settings,
    artifacts: ArtifactStore,
) -> FitSpec:
    """Return everything that a generation of an index depends on, given what it is made over.

    Raises:
        RecipeMissing: if the method trains the model, and it has no recipe.
    """
    trained = await _trained(session, index, model, dataset, settings, artifacts)
    tokenizer = TokenizerSpec.model_validate(model.tokenizer) if model.tokenizer else None
    source = tokenizer.source if tokenizer else None
    return FitSpec.model_validate(
        {
            "architecture": model.architecture,
            "task": model.task,
            "tokenizer": model.tokenizer,
            "tokenizer_path": resolve(settings.roots, source, "/model") if source else None,
            "dataset": datasets.dataset_ref(dataset, artifacts),
            "checkpoints": [
                CheckpointRef(
                    id=c.id,
                    path=artifacts.open(c.artifact) / models.WEIGHTS_FILE,
                    sha256=c.sha256,
                    run=c.run,
                    step=c.step,
                    learning_rate=c.learning_rate,
                )
                for c in checkpoints
            ],
            **trained,
            "method": index.method,
            "measurement": index.measurement,
            "layers": index.layers,
            "precision": index.precision,
            "store": index.store,
            "search": index.search,
            "left_out": generation.left_out,
            "base": _base(index, generation, artifacts),
            "shard_size": index.shard_size,
        }
    )


async def set_quality(
    session: AsyncSession, index_id: str, artifact: str, quality: dict[str, Any], calibration: dict[str, Any] | None
) -> None:
    """Attach what an evaluation measured of an index's files to it, unless another generation has taken their place."""
    index = await find(session, index_id, lock=True)
    if index.artifact == artifact:
        index.quality, index.calibration = quality, calibration


async def fail_fit(session: AsyncSession, index_id: str, error: dict[str, Any]) -> None:
    """Record why a fit failed."""
    index = await find(session, index_id, lock=True)
    index.status, index.error = "failed", error


async def begin_fit(session: AsyncSession, job: Job) -> None:
    """Record that an index is being fitted again."""
    index = await find(session, job.resource_id, lock=True)
    index.status, index.error = "fitting", None


def shown(index: Index) -> IndexOut:
    """Return an index as clients see it."""
    same = set(IndexOut.model_fields) - {"model", "dataset", "checkpoints", "job", "notion"}
    return IndexOut(
        model=index.model_id,
        dataset=index.dataset_id,
        checkpoints=index.checkpoint_ids,
        job=index.job_id,
        notion=METHODS[index.method["type"]].notion,
        **{name: getattr(index, name) for name in same},
    )


async def named_artifacts(session: AsyncSession, names: Sequence[str]) -> set[str]:
    """Return which artifacts are those of generations, also of those that are being made."""
    ids = {name.rpartition("/")[2].partition(".")[0] for name in names}
    made = {artifact_name(*generation) for generation in await repository.generations(session, sorted(ids))}
    return made & set(names)


def artifact_name(index_id: str, number: int) -> str:
    """Return the name of a generation's files."""
    return f"indexes/{index_id}" if number == 1 else f"indexes/{index_id}.{number}"


def _base(index: Index, generation: IndexGeneration, artifacts: ArtifactStore) -> dict[str, Any] | None:
    """Return what a generation extends; its files are asked for while the extension is made only."""
    if generation.base is None:
        return None
    name = generation.base["artifact"]
    folder = artifacts.open(name) if generation.number > index.generation else Path(name)
    return {"folder": folder, **{key: value for key, value in generation.base.items() if key != "artifact"}}


async def _trained(
    session: AsyncSession, index: Index, model: Model, dataset: Dataset, settings: Settings, artifacts: ArtifactStore
) -> dict[str, Any]:
    """Return what a fit that trains the model needs beyond the others: recipe, initial weights, named queries, bank and priors.

    Raises:
        RecipeMissing: if the model has no recipe.
    """
    if "recipe" not in METHODS[index.method["type"]].needs:
        return {}
    # Such methods are refused where examples were deleted (`check_deletions`), so nothing is left out.
    train = await banks.train_spec(session, model, dataset, [], settings, artifacts)
    found: dict[str, Any] = {"recipe": train.recipe, "initial": train.initial}
    if index.queries_id is not None:
        queries = await datasets.find_ready(session, index.queries_id)
        found["queries"] = datasets.dataset_ref(queries, artifacts, dataset)
    if index.bank_id is not None:
        count = Protocol.model_validate(index.method["bank"]).num_groups(model.num_parameters)
        found["bank"] = await banks.group_files(session, index.bank_id, artifacts, count)
    priors = [await find_ready(session, prior) for prior in index.method.get("prior", [])]
    found["priors"] = [
        PriorRef(
            id=prior.id,
            folder=artifacts.open(prior.artifact or ""),
            fit=await fit_spec(session, prior.id, settings, artifacts),
        )
        for prior in priors
    ]
    return found


def _product(shape: list[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


async def _finished(session: AsyncSession, index_id: str) -> IndexOut:
    return shown(await find(session, index_id))


jobs.SHOWN |= dict.fromkeys(("fit", "extension", "refresh"), _finished)
jobs.RESOURCES["fit"] = jobs.Resource(begin_fit, fail_fit)
