"""Submitting replays, and showing them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
from sqlalchemy.ext.asyncio import AsyncSession

from app.banks import service as banks
from app.datasets import service as datasets
from app.db.ids import new_id
from app.db.tables import Dataset, Index, Job, Model, Replay
from app.errors import InvalidRequest, NotFound
from app.indexes import service as indexes
from app.jobs import service as jobs
from app.jobs.schemas import JobKind
from app.models import service as models
from app.queries import service as queries
from app.queries.schemas import CounterfactualRequest
from app.replay import plans, repository
from app.replay.schemas import (
    EvaluationCreate,
    EvaluationOut,
    QuerySet,
    ReplayOut,
    TrainedRun,
    TrainingCreate,
    TrainingOut,
    UnlearnedCreate,
    UnlearnedOut,
    VerificationCreate,
    VerificationOut,
)
from app.web.pagination import Page, PageOf, cut
from app.web.resources import Resources
from attribution_core.errors import InvalidInputError, located
from attribution_core.evaluate.checks import check_evaluation
from attribution_core.method_spec import METHODS
from attribution_core.sampling import evenly_spread
from attribution_core.training.spec import TrainSpec

Json = dict[str, Any]
Shown = TypeVar("Shown", bound=ReplayOut)
_SHOWN_ROWS = 1000
_MAX_SAVED = 1000
_MAX_SAVED_PARAMETERS = 1 << 30


async def create_training(
    session: AsyncSession, resources: Resources, reference: str, request: TrainingCreate
) -> tuple[Replay, Job]:
    """Submit a training from a model's recipe.

    Raises:
        RecipeMissing: if the model has none.
        InvalidRequest: if the data set does not fit the model, or it would take too long.
        Conflict: if the model has checkpoints of such a run.
    """
    model = await models.find(session, reference)
    dataset = await datasets.find_ready(session, request.dataset)
    banks.recipe_of(model)
    indexes.check_fits(model, dataset)
    await plans.refuse_runs(session, model, request.run_names())
    left_out = await datasets.left_out(session, dataset)
    spec = await banks.train_spec(session, model, dataset, left_out, resources.settings, resources.artifacts)
    _check_saved(request, spec, model)
    await banks.check_hours(resources, spec, spec.num_training * len(request.seeds), request.max_hours)
    return await _submitted(session, "training", request.model_dump(mode="json"), model, dataset, left_out, None)


async def create_evaluation(
    session: AsyncSession, resources: Resources, reference: str, request: EvaluationCreate
) -> tuple[Replay, Job]:
    """Submit an evaluation of an index; its banks are found or made here, once all else is known to be right.

    Raises:
        RecipeMissing: if the index's model has none.
        InvalidRequest: if the queries do not fit, or retraining would take too long.
    """
    index, model, training, spec = await _replayable(session, resources, reference)
    asked = await datasets.find_ready(session, request.queries.dataset)
    indexes.check_fits(model, asked, "/queries/dataset")
    rows = _rows_of(request.queries, asked, await datasets.deleted_rows(session, asked.id), "/queries/rows")
    if request.removal is not None and not index.checkpoint_ids:
        raise InvalidRequest("The similarity ranking needs a checkpoint, and this index has none.", pointer="/removal")
    if request.mislabelled is not None and not METHODS[index.method["type"]].self_influence:
        raise InvalidRequest(f"The method {index.method['type']} has no self-influence.", pointer="/mislabelled")
    await queries.check_answers(session, resources, index, asked, rows)
    await plans.rivals(session, index, request)
    body = request.model_dump(mode="json", by_alias=True)
    body["queries"] = {"dataset": asked.id, "rows": rows}
    examples = 0.0
    for protocol in await plans.protocols(session, index, request):
        bank = await banks.existing_bank(session, spec, protocol)
        if bank is not None and bank.id == index.bank_id:
            raise InvalidRequest(
                "The index learnt from these very retrainings: name another `seed` of the subsets.",
                pointer="/protocol/seed",
            )
        examples += await banks.missing_examples(session, bank, protocol, model, spec)
    extra = (request.loo.examples * request.loo.seeds + request.loo.seeds) if request.loo else 0
    if request.removal:
        extra += request.removal.retrainings()
    examples += extra * spec.num_training
    await banks.check_hours(resources, spec, examples, request.max_hours)
    replay, job = await _submitted(session, "evaluation", body, model, training, spec.left_out, index)
    planned, _ = await plans.evaluation_plan(session, replay.id, resources.settings, resources.artifacts)
    await asyncio.to_thread(check_evaluation, planned)
    return replay, job


async def create_verification(
    session: AsyncSession, resources: Resources, reference: str, request: VerificationCreate
) -> tuple[Replay, Job]:
    """Submit a verification of an index's predictions.

    Raises:
        RecipeMissing: if the index's model has none.
        InvalidRequest: if queries or subsets do not fit, or retraining would take too long.
    """
    index, model, training, spec = await _replayable(session, resources, reference)
    removed = await queries.check_predictable(session, resources, reference, verification_question(request))
    for number, size in enumerate(removed):
        if size is not None and request.semantics == "resample":
            with located(f"/subsets/{number}"):
                spec.recipe.check_steps(spec.num_training - size)
    count = sum(len(selection.rows or [0]) for selection in request.queries)
    per_query = [
        selector.top_positive or selector.top_negative
        for subset in request.subsets
        if (selector := subset.remove or subset.keep) is not None
    ]
    sets = 1 + sum(count if relative else 1 for relative in per_query)
    examples = sets * len(request.seeds) * spec.num_training
    await banks.check_hours(resources, spec, examples, request.max_hours)
    body = request.model_dump(mode="json", by_alias=True)
    return await _submitted(session, "verification", body, model, training, spec.left_out, index)


def verification_question(request: VerificationCreate) -> CounterfactualRequest:
    """Return the question whose answer a verification holds against retraining."""
    return CounterfactualRequest(
        queries=request.queries, subsets=request.subsets, damping=request.damping, interval=request.interval
    )


async def create_unlearned(
    session: AsyncSession, resources: Resources, reference: str, request: UnlearnedCreate
) -> tuple[Replay, Job]:
    """Submit an unlearning; the forget set's rows are fixed here.

    Raises:
        RecipeMissing: if a comparison is asked for and the model has no recipe.
        InvalidRequest: if it cannot be done, or retraining and fine-tuning together would take too long.
        Conflict: if the model has checkpoints of such a run.
    """
    index = await indexes.find_ready(session, reference)
    model = await models.find(session, index.model_id)
    training = await datasets.find_ready(session, index.dataset_id)
    sources = await models.checkpoints_by_id(session, model.id, index.checkpoint_ids)
    await plans.refuse_runs(session, model, (f"{request.run}-{source.run}"[:64] for source in sources))
    left_out = await datasets.left_out(session, training)
    if request.check is not None:
        banks.recipe_of(model)
    rows = await queries.forgotten_rows(session, resources, index, request.forget)
    body = request.model_dump(mode="json", by_alias=True)
    body["forget"] = {"rows": rows}
    if request.check is not None and request.check.test is not None:
        test = await datasets.find_ready(session, request.check.test.dataset)
        indexes.check_fits(model, test, "/check/test/dataset")
        deleted = await datasets.deleted_rows(session, test.id)
        chosen = _rows_of(request.check.test, test, deleted, "/check/test/rows")
        body["check"]["test"] = {"dataset": test.id, "rows": chosen}
    replay, job = await _submitted(session, "unlearning", body, model, training, left_out, index)
    planned = await plans.unlearning_plan(session, replay.id, resources.settings, resources.artifacts)
    try:
        planned.check()
    except InvalidInputError as error:
        raise InvalidRequest(str(error), pointer=_of_check(error.pointer)) from None
    trainings = planned.fine_tunings()
    if planned.train is not None and planned.oracles:
        trainings.append((planned.train, planned.oracles * planned.train.num_training))
    hours = [await banks.hours_of(resources, spec, examples) for spec, examples in trainings]
    banks.refuse_hours(resources, sum(hours), request.max_hours)
    return replay, job


async def find_of_index(session: AsyncSession, kind: str, index: str, replay_id: str) -> Replay:
    """Return a replay of an index.

    Raises:
        NotFound: if the index has none of that id.
    """
    found, replay = await indexes.find(session, index), await plans.find(session, kind, replay_id)
    if replay.index_id != found.id:
        raise NotFound(f"Index {found.name!r} has no {kind} {replay_id[:64]!r}.")
    return replay


async def find_training(session: AsyncSession, model: str, replay_id: str) -> Replay:
    """Return a training of a model.

    Raises:
        NotFound: if the model has none of that id.
    """
    found, replay = await models.find(session, model), await plans.find(session, "training", replay_id)
    if replay.model_id != found.id:
        raise NotFound(f"Model {found.name!r} has no training {replay_id[:64]!r}.")
    return replay


async def trainings(session: AsyncSession, model: str, page: Page) -> PageOf[TrainingOut]:
    """Return one page of a model's trainings, newest first."""
    found = await models.find(session, model)
    return await _page(session, "training", found.id, page, shown_training, model_id=found.id)


async def evaluations(session: AsyncSession, index: str, page: Page) -> PageOf[EvaluationOut]:
    """Return one page of an index's evaluations, newest first."""
    found = await indexes.find(session, index)
    return await _page(session, "evaluation", found.id, page, shown_evaluation, index_id=found.id)


async def verifications(session: AsyncSession, index: str, page: Page) -> PageOf[VerificationOut]:
    """Return one page of an index's verifications, newest first."""
    found = await indexes.find(session, index)
    return await _page(session, "verification", found.id, page, shown_verification, index_id=found.id)


async def unlearnings(session: AsyncSession, index: str, page: Page) -> PageOf[UnlearnedOut]:
    """Return one page of an index's unlearnings, newest first."""
    found = await indexes.find(session, index)
    return await _page(session, "unlearning", found.id, page, shown_unlearned, index_id=found.id)


async def _page(
    session: AsyncSession, kind: str, owner: str, page: Page, show: Callable[[Replay], Shown], **of: str
) -> PageOf[Shown]:
    """Return one page of the replays of a kind that belong to a model or an index."""
    route = f"{kind}:{owner}"
    rows, following = cut(await repository.page(session, kind, page, route, **of), page, route)
    return PageOf(items=[show(row) for row in rows], next=following)


def shown_training(replay: Replay) -> TrainingOut:
    """Return a training as clients see it."""
    runs = None if replay.result is None else [TrainedRun(**run) for run in replay.result["runs"]]
    asked = TrainingCreate.model_validate(replay.request)
    return TrainingOut(
        model=replay.model_id,
        dataset=replay.dataset_id,
        seeds=asked.seeds,
        save_every=asked.save_every,
        runs=runs,
        **_common(replay),
    )


def shown_evaluation(replay: Replay) -> EvaluationOut:
    """Return an evaluation as clients see it."""
    return EvaluationOut(index=replay.index_id or "", request=replay.request, quality=replay.result, **_common(replay))


def shown_verification(replay: Replay) -> VerificationOut:
    """Return a verification as clients see it."""
    result = replay.result or {"retrainings": None, "diverged": None, "results": None}
    return VerificationOut(index=replay.index_id or "", request=replay.request, **result, **_common(replay))


def shown_unlearned(replay: Replay) -> UnlearnedOut:
    """Return an unlearning as clients see it; of a large forget set the first rows are shown."""
    rows = replay.request["forget"]["rows"]
    request = {**replay.request, "forget": {"rows": rows[:_SHOWN_ROWS]}}
    result = replay.result or {"checkpoints": None, "comparison": None}
    return UnlearnedOut(
        index=replay.index_id or "", request=request, forget_size=len(rows), **result, **_common(replay)
    )


async def _replayable(
    session: AsyncSession, resources: Resources, reference: str
) -> tuple[Index, Model, Dataset, TrainSpec]:
    index = await indexes.find_ready(session, reference)
    model = await models.find(session, index.model_id)
    training = await datasets.find_ready(session, index.dataset_id)
    left_out = await datasets.left_out(session, training)
    spec = await banks.train_spec(session, model, training, left_out, resources.settings, resources.artifacts)
    return index, model, training, spec


async def _submitted(
    session: AsyncSession,
    kind: JobKind,
    body: Json,
    model: Model,
    dataset: Dataset,
    left_out: list[int],
    index: Index | None,
) -> tuple[Replay, Job]:
    await plans.keep_asked_datasets(session, body)
    replay = Replay(
        id=new_id(plans.PREFIXES[kind]),
        kind=kind,
        model_id=model.id,
        dataset_id=dataset.id,
        index_id=index.id if index else None,
        request=body,
        left_out=left_out,
        status="running",
    )
    session.add(replay)
    await session.flush()
    job = await jobs.submit(session, kind, kind, replay.id, unit="steps")
    replay.job_id = job.id
    await session.flush()
    await session.refresh(replay)
    return replay, job


def _check_saved(request: TrainingCreate, spec: TrainSpec, model: Model) -> None:
    """Refuse to keep more checkpoints than anything could take, or than fit in a worker's memory.

    Raises:
        InvalidRequest: with their number.
    """
    with located("/dataset"):
        spec.recipe.check_steps(spec.num_training)
    steps = spec.recipe.num_steps(spec.num_training)
    count = len(request.seeds) * (1 if request.save_every is None else -(-steps // request.save_every))
    if count > _MAX_SAVED or (request.save_every is not None and count * model.num_parameters > _MAX_SAVED_PARAMETERS):
        raise InvalidRequest(
            f"{count:,} checkpoints of {model.num_parameters:,} parameters are too many: save less often.",
            pointer="/save_every",
        )


def _of_check(pointer: str | None) -> str | None:
    """Return where a request has what the library has beside the method: a comparison is an object of its own."""
    compared = pointer is not None and pointer.split("/")[1] in ("baselines", "oracles", "test")
    return f"/check{pointer}" if compared else pointer


def _rows_of(asked: QuerySet, dataset: Dataset, deleted: list[int], pointer: str) -> list[int]:
    total = dataset.num_examples or 0
    if asked.rows is None:
        rows = np.setdiff1d(np.arange(total), np.asarray(deleted, np.int64))
        return [int(row) for row in rows[evenly_spread(len(rows), asked.count)]]
    if max(asked.rows) >= total or len(set(asked.rows)) != len(asked.rows):
        raise InvalidRequest(f"Rows must differ and be below {total}.", pointer=pointer)
    if gone := sorted(set(asked.rows) & set(deleted)):
        raise InvalidRequest(f"Row {gone[0]} was deleted.", pointer=pointer)
    return asked.rows


def _common(replay: Replay) -> Json:
    return {
        "id": replay.id,
        "status": replay.status,
        "job": replay.job_id,
        "error": replay.error,
        "created_at": replay.created_at,
    }


def _finished(kind: str, show: Callable[[Replay], ReplayOut]) -> Callable[[AsyncSession, str], Awaitable[ReplayOut]]:
    async def found(session: AsyncSession, replay_id: str) -> ReplayOut:
        return show(await plans.find(session, kind, replay_id))

    return found


_SHOW: dict[str, Callable[[Replay], ReplayOut]] = {
    "training": shown_training,
    "evaluation": shown_evaluation,
    "verification": shown_verification,
    "unlearning": shown_unlearned,
}
jobs.SHOWN |= {kind: _finished(kind, show) for kind, show in _SHOW.items()}
