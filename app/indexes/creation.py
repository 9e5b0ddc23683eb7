"""Making an index: what belongs together, and what it is bound to before its fit is submitted."""

import asyncio

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.banks import service as banks
from app.datasets import service as datasets
from app.db.failures import is_duplicate
from app.db.ids import new_id
from app.db.tables import Dataset, Index, IndexGeneration, IndexPrior, Job, Model
from app.errors import InvalidRequest, NameTaken
from app.indexes import service as indexes
from app.indexes.schemas import IndexCreate
from app.jobs import service as jobs
from app.models import service as models
from app.storage.artifacts import ArtifactStore
from app.web.resources import Resources
from attribution_core.auto import Choice, Situation, chosen
from attribution_core.bank_methods.checks import check_retrainings
from attribution_core.exact_checks import check_exact, determining_row
from attribution_core.fit_spec import FitSpec
from attribution_core.layer_names import unmatched_layers
from attribution_core.method_spec import (
    METHODS,
    AutoMethod,
    BankMethodBase,
    ExactMethod,
    MagicMethod,
    MethodSpec,
    PosteriorMethod,
    SourceMethod,
)

_DEFAULT_MEASUREMENT = {"classification": "margin", "regression": "prediction", "causal_lm": "log_likelihood"}


async def create(session: AsyncSession, request: IndexCreate, resources: Resources) -> tuple[Index, Job]:
    """Register an index and submit its fit.

    Raises:
        InvalidRequest: if model, data set, checkpoints, method and measurement do not belong together.
        NotReady: if the data set is not imported, or every example of it was deleted.
        RecipeMissing: if the method trains the model, and it has no recipe.
        NameTaken: if an index of that name exists.
    """
    settings, artifacts = resources.settings, resources.artifacts
    model = await models.find(session, request.model)
    dataset = await datasets.find_ready(session, request.dataset)
    indexes.check_fits(model, dataset)
    left_out = await datasets.left_out(session, dataset)
    method, choice = await asyncio.to_thread(_method, request, model, dataset, left_out, artifacts)
    trains = isinstance(method, MagicMethod)
    checkpoints = [] if trains else await models.chosen_checkpoints(session, model, request.checkpoints)
    index = Index(
        id=new_id("idx"),
        name=request.name,
        model_id=model.id,
        dataset_id=dataset.id,
        checkpoint_ids=[checkpoint.id for checkpoint in checkpoints],
        method=method.model_dump(mode="json"),
        choice=None if choice is None else choice.model_dump(mode="json"),
        measurement=request.measurement or _DEFAULT_MEASUREMENT[model.task["type"]],
        layers=request.layers,
        precision=request.precision,
        store=request.store.model_dump(mode="json"),
        search=request.search.model_dump(mode="json"),
        shard_size=settings.worker.shard_size,
        status="fitting",
        fingerprint="",
        generation=1,
    )
    first = IndexGeneration(
        index_id=index.id, number=1, dataset_id=dataset.id, left_out=left_out, base=None, fingerprint=""
    )
    priors: list[Index] = []
    if "recipe" in method.needs:
        _check_trained(request)
        priors = await _bound(session, index, method, model, dataset, left_out, resources)
    spec = await indexes.spec_over(session, index, first, model, dataset, checkpoints, settings, artifacts)
    if index.measurement not in spec.task.measurements:
        known = ", ".join(spec.task.measurements)
        raise InvalidRequest(f"A {spec.task.type} model is measured by {known}.", pointer="/measurement")
    if isinstance(spec.method, ExactMethod) and spec.architecture.name not in ExactMethod.architectures:
        known = " and ".join(ExactMethod.architectures)
        raise InvalidRequest(f"Exact attribution is for the architectures {known}.", pointer="/method/type")
    spec.check_trajectory()
    spec.check_store()
    spec.check_projection()
    spec.check_head()
    indexes.check_deletions(spec)
    await asyncio.to_thread(check_retrainings, spec)
    await asyncio.to_thread(check_exact, spec)
    _check_optimizer(spec, model)
    _check_layers(index, model)
    index.fingerprint = first.fingerprint = spec.fingerprint()
    session.add(index)
    try:
        await session.flush()
    except IntegrityError as error:
        if not is_duplicate(error):
            raise
        raise NameTaken(f"There is an index {request.name!r} already.", pointer="/name") from None
    unit, total = _work(spec)
    job = await jobs.submit(session, "fit", "index", index.id, unit=unit, total=total)
    index.job_id = first.job_id = job.id
    session.add(first)
    session.add_all(IndexPrior(index_id=index.id, prior_id=prior.id) for prior in priors)
    await session.flush()
    await session.refresh(index)
    return index, job


def _method(
    request: IndexCreate, model: Model, dataset: Dataset, left_out: list[int], artifacts: ArtifactStore
) -> tuple[MethodSpec, Choice | None]:
    """Return the method to fit, and how it was chosen if the choice was left to us."""
    if not isinstance(request.method, AutoMethod):
        return request.method, None
    arguments = model.architecture["arguments"]
    linear = model.architecture["name"] in ExactMethod.architectures
    situation = Situation(
        architecture=model.architecture["name"],
        task=model.task["type"],
        num_parameters=model.num_parameters,
        num_examples=(dataset.num_examples or 0) - len(left_out),
        num_features=arguments["input_dim"] + 1 if linear else None,
        all_layers=request.layers is None,
        determined_alone=linear
        and determining_row(datasets.dataset_ref(dataset, artifacts), left_out, bool(arguments.get("bias", True)))
        is not None,
    )
    return chosen(request.method, situation)


async def _bound(
    session: AsyncSession,
    index: Index,
    method: MethodSpec,
    model: Model,
    dataset: Dataset,
    left_out: list[int],
    resources: Resources,
) -> list[Index]:
    """Bind an index whose method trains the model to its queries and bank, and return the indexes that it begins with.

    Raises:
        RecipeMissing: if the model has no recipe.
        InvalidRequest: if queries or priors do not fit, or training would take too long.
    """
    banks.recipe_of(model, "/method/type")
    train = await banks.train_spec(session, model, dataset, left_out, resources.settings, resources.artifacts)
    if isinstance(method, MagicMethod | PosteriorMethod):
        queries = await _checked_queries(session, model, method)
        index.queries_id = queries.id
        index.method["queries"]["dataset"] = queries.id
    priors = await _checked_priors(session, index, method) if isinstance(method, PosteriorMethod) else []
    index.method |= {"prior": [prior.id for prior in priors]} if priors else {}
    if isinstance(method, BankMethodBase):
        bank = await banks.existing_bank(session, train, method.bank)
        examples = await banks.missing_examples(session, bank, method.bank, model, train)
        await banks.check_hours(resources, train, examples, None, "/method/bank/subsets")
        index.bank_id = (await banks.find_bank(session, model, dataset, train, method.bank)).id
    if isinstance(method, MagicMethod):
        examples = method.trainings * train.num_training
        await banks.check_hours(resources, train, examples, None, "/method/queries")
    return priors


async def _checked_priors(session: AsyncSession, index: Index, method: PosteriorMethod) -> list[Index]:
    """Return the indexes that a posterior begins with.

    Raises:
        InvalidRequest: if one scores something else, or only named queries.
    """
    priors = []
    for place, reference in enumerate(method.prior):
        prior, pointer = await indexes.find_ready(session, reference), f"/method/prior/{place}"
        same = ("model_id", "dataset_id", "measurement")
        if any(getattr(prior, name) != getattr(index, name) for name in same):
            raise InvalidRequest("A prior is of the same model, data set and measurement.", pointer=pointer)
        if METHODS[prior.method["type"]].keeps != "features":
            raise InvalidRequest(f"A {prior.method['type']} index cannot score every query.", pointer=pointer)
        priors.append(prior)
    if len({prior.id for prior in priors}) != len(priors):
        raise InvalidRequest("A prior is named twice.", pointer="/method/prior")
    return priors


async def _checked_queries(session: AsyncSession, model: Model, method: MagicMethod | PosteriorMethod) -> Dataset:
    """Return the data set of a method's named queries.

    Raises:
        InvalidRequest: if the model cannot take it, or a row does not exist or was deleted.
    """
    queries = await datasets.find_ready(session, method.queries.dataset)
    indexes.check_fits(model, queries, "/method/queries/dataset")
    deleted = set(await datasets.deleted_rows(session, queries.id))
    for place, row in enumerate(method.queries.rows):
        pointer = f"/method/queries/rows/{place}"
        if row >= (queries.num_examples or 0):
            raise InvalidRequest(f"Data set {queries.name!r} has {queries.num_examples} rows.", pointer=pointer)
        if row in deleted:
            raise InvalidRequest(f"Row {row} of data set {queries.name!r} was deleted.", pointer=pointer)
    return queries


def _check_trained(request: IndexCreate) -> None:
    """Refuse what a method that trains the model has no use for.

    Raises:
        InvalidRequest: naming the field.
    """
    if request.layers is not None:
        raise InvalidRequest(f"{request.method.type} attributes all parameters.", pointer="/layers")
    if request.precision != "float32":
        raise InvalidRequest(f"{request.method.type} trains in float32.", pointer="/precision")


def _check_optimizer(spec: FitSpec, model: Model) -> None:
    """Refuse SOURCE where the recipe says that the model was trained with another optimizer than it unrolls.

    Raises:
        InvalidRequest: naming the optimizer.
    """
    optimizer = (model.recipe or {}).get("optimizer", {}).get("type", "sgd")
    if isinstance(spec.method, SourceMethod) and optimizer != "sgd":
        raise InvalidRequest(
            f"SOURCE unrolls SGD, and the model's recipe trains with {optimizer}: use magic or ekfac.",
            pointer="/method/type",
        )


def _work(spec: FitSpec) -> tuple[str, int | None]:
    """Return the unit and the number of a fit's progress, None where the worker tells it."""
    if isinstance(spec.method, BankMethodBase):
        return "steps", None
    if isinstance(spec.method, MagicMethod) and spec.recipe is not None:
        return "steps", spec.recipe.epochs * spec.recipe.steps_per_epoch(spec.num_training) * spec.method.trainings
    return "examples", spec.num_training * len(spec.members) * len(spec.method.stages)


def _check_layers(index: Index, model: Model) -> None:
    known = {name.rpartition(".")[0] for name in model.parameters}
    unknown = unmatched_layers(index.layers or [], known)
    if unknown:
        raise InvalidRequest(
            f"The model has no layer {unknown[0][:64]!r}; it has {', '.join(sorted(known))[:500]}.", pointer="/layers"
        )
