"""Submitting replays, what a worker needs to know of them, and what it reports."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from sqlalchemy.ext.asyncio import AsyncSession

from app.banks import service as banks
from app.datasets import service as datasets
from app.db.ids import new_id
from app.db.tables import Checkpoint, Dataset, Index, Job, Model, Replay
from app.errors import Conflict, InvalidRequest, NotFound
from app.indexes import service as indexes
from app.jobs import service as jobs
from app.jobs.schemas import JobKind
from app.models import service as models
from app.models.schemas import CheckpointMeta
from app.queries import service as queries
from app.replay import repository
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
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from app.web.pagination import Page, PageOf, cut
from app.web.resources import Resources
from attribution_core.evaluate.spec import BankRef, EvaluationSpec, TuneSpec
from attribution_core.fit_spec import PriorRef
from attribution_core.method_spec import METHODS
from attribution_core.training.spec import Protocol, TrainSpec
from attribution_core.unlearning.spec import EvaluationSet, UnlearnSpec
from attribution_core.weights import WeightsSummary

Json = dict[str, Any]
Shown = TypeVar("Shown", bound=ReplayOut)
_PREFIXES = {"training": "trn", "evaluation": "eval", "verification": "ver", "unlearning": "unl"}
_SHOWN_ROWS = 1000


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
    names = {f"{request.run}-{seed}" for seed in request.seeds}
    taken = sorted(names & await models.runs(session, model.id))
    if taken:
        raise Conflict(f"Model {model.name!r} has checkpoints of run {taken[0]!r}; name another `run`.", pointer="/run")
    left_out = await datasets.deleted_rows(session, dataset.id)
    spec = await banks.train_spec(session, model, dataset, left_out, resources.settings, resources.artifacts)
    await banks.check_hours(resources, spec, spec.num_training * len(request.seeds), request.max_hours)
    return await _submitted(session, "training", request.model_dump(mode="json"), model, dataset, left_out, None)


async def create_evaluation(
    session: AsyncSession, resources: Resources, reference: str, request: EvaluationCreate
) -> tuple[Replay, Job]:
    """Submit an evaluation of an index; its banks are found or made here.

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
    await _rivals(session, index, request)
    body = request.model_dump(mode="json", by_alias=True)
    body["queries"] = {"dataset": asked.id, "rows": rows}
    examples = 0.0
    for protocol in await protocols(session, index, request):
        bank = await banks.find_bank(session, model, training, spec, protocol)
        if bank.id == index.bank_id:
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
    return await _submitted(session, "evaluation", body, model, training, spec.left_out, index)


async def create_verification(
    session: AsyncSession, resources: Resources, reference: str, request: VerificationCreate
) -> tuple[Replay, Job]:
    """Submit a verification of an index's predictions.

    Raises:
        RecipeMissing: if the index's model has none.
        InvalidRequest: if queries or subsets do not fit, or retraining would take too long.
    """
    index, model, training, spec = await _replayable(session, resources, reference)
    count = 0
    for number, selection in enumerate(request.queries):
        count += len(selection.rows or [0])
        if selection.dataset is not None:
            dataset = await datasets.find_ready(session, selection.dataset)
            indexes.check_fits(model, dataset, f"/queries/{number}/dataset")
            outside = [row for row in selection.rows or [] if row >= (dataset.num_examples or 0)]
            if outside:
                raise InvalidRequest(
                    f"Data set {dataset.name!r} has {dataset.num_examples} rows.", pointer=f"/queries/{number}/rows"
                )
    limits = resources.settings.limits
    if count > limits.max_queries:
        raise InvalidRequest(f"A request may have {limits.max_queries} queries, not {count}.", pointer="/queries")
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


async def create_unlearned(
    session: AsyncSession, resources: Resources, reference: str, request: UnlearnedCreate
) -> tuple[Replay, Job]:
    """Submit an unlearning; the forget set's rows are fixed here.

    Raises:
        RecipeMissing: if a comparison is asked for and the model has no recipe.
        InvalidRequest: if it cannot be done, or retraining would take too long.
        Conflict: if the model has checkpoints of such a run.
    """
    index = await indexes.find_ready(session, reference)
    model = await models.find(session, index.model_id)
    training = await datasets.find_ready(session, index.dataset_id)
    sources = await models.checkpoints_by_id(session, model.id, index.checkpoint_ids)
    taken = sorted({f"{request.run}-{source.run}" for source in sources} & await models.runs(session, model.id))
    if taken:
        raise Conflict(f"Model {model.name!r} has checkpoints of run {taken[0]!r}; name another `run`.", pointer="/run")
    left_out = await datasets.deleted_rows(session, training.id)
    if request.check is not None:
        spec = await banks.train_spec(session, model, training, left_out, resources.settings, resources.artifacts)
        examples = request.check.oracles * spec.num_training
        await banks.check_hours(resources, spec, examples, request.max_hours)
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
    (await unlearning_plan(session, replay.id, resources.settings, resources.artifacts)).check()
    return replay, job


async def protocols(session: AsyncSession, index: Index, request: EvaluationCreate) -> list[Protocol]:
    """Return the banks an evaluation needs, its main one first; the deterministic ones take the seed of the index's own training."""
    main = request.protocol
    seeds = [
        index.method.get("seed") if index.queries_id else None,  # a method that trains the model itself
        *(found.seed for found in await models.checkpoints_by_id(session, index.model_id, index.checkpoint_ids[:1])),
        main.first_seed,
    ]
    seed = next(seed for seed in seeds if seed is not None)
    return [main] + [
        Protocol(alpha=alpha, subsets=main.subsets, semantics="mask", seeds=1, first_seed=seed)
        for alpha in request.deterministic
    ]


async def training_plan(
    session: AsyncSession, replay_id: str, settings: Settings, artifacts: ArtifactStore
) -> tuple[TrainSpec, TrainingCreate, Json]:
    """Return what a training job trains, and the skeleton that its checkpoints must fit.

    Raises:
        NotFound: if it was deleted meanwhile.
    """
    replay = await find(session, "training", replay_id)
    model = await models.find(session, replay.model_id)
    dataset = await datasets.find_ready(session, replay.dataset_id or "")
    spec = await banks.train_spec(session, model, dataset, replay.left_out, settings, artifacts)
    return spec, TrainingCreate.model_validate(replay.request), model.parameters


async def evaluation_plan(
    session: AsyncSession, replay_id: str, settings: Settings, artifacts: ArtifactStore
) -> tuple[EvaluationSpec, list[tuple[str, str]]]:
    """Return what an evaluation job measures, and its banks' ids and folders.

    Raises:
        NotFound: if it was deleted meanwhile.
    """
    replay = await find(session, "evaluation", replay_id)
    request = EvaluationCreate.model_validate(replay.request)
    index = await _index_of(session, replay)
    model = await models.find(session, replay.model_id)
    training = await datasets.find_ready(session, index.dataset_id)
    asked = await datasets.find_ready(session, request.queries.dataset)
    spec = await banks.train_spec(session, model, training, replay.left_out, settings, artifacts)
    found: list[BankRef] = []
    places: list[tuple[str, str]] = []
    for protocol in await protocols(session, index, request):
        bank = await banks.find_bank(session, model, training, spec, protocol)
        files = await banks.group_files(session, bank.id, artifacts, protocol.num_groups(model.num_parameters))
        found.append(BankRef(protocol=protocol, groups=files))
        places.append((bank.id, banks.folder_of(bank)))
    return EvaluationSpec(
        folder=artifacts.open(index.artifact or ""),
        fit=await indexes.fit_spec(session, index.id, settings, artifacts),
        train=spec,
        queries=datasets.dataset_ref(asked, artifacts, like=training),
        rows=request.queries.rows or [],
        banks=found,
        loo=request.loo,
        removal=request.removal,
        mislabelled=request.mislabelled,
        source=request.source,
        tune=request.tune,
        rivals=[
            PriorRef(
                id=rival.id,
                folder=artifacts.open(rival.artifact or ""),
                fit=await indexes.fit_spec(session, rival.id, settings, artifacts),
            )
            for rival in await _rivals(session, index, request)
        ],
    ), places


async def verification_plan(
    session: AsyncSession, replay_id: str, settings: Settings, artifacts: ArtifactStore
) -> tuple[Replay, VerificationCreate, TrainSpec]:
    """Return what a verification job was asked, and how its model is trained.

    Raises:
        NotFound: if it was deleted meanwhile.
    """
    replay = await find(session, "verification", replay_id)
    index = await _index_of(session, replay)
    model = await models.find(session, replay.model_id)
    training = await datasets.find_ready(session, index.dataset_id)
    spec = await banks.train_spec(session, model, training, replay.left_out, settings, artifacts)
    return replay, VerificationCreate.model_validate(replay.request), spec


async def unlearning_plan(
    session: AsyncSession, replay_id: str, settings: Settings, artifacts: ArtifactStore
) -> UnlearnSpec:
    """Return what an unlearning job does.

    Raises:
        NotFound: if it was deleted meanwhile.
    """
    replay = await find(session, "unlearning", replay_id)
    request = UnlearnedCreate.model_validate(replay.request)
    index = await _index_of(session, replay)
    model = await models.find(session, replay.model_id)
    training = await datasets.find_ready(session, index.dataset_id)
    check, test = request.check, None
    if check is not None and check.test is not None:
        asked = await datasets.find_ready(session, check.test.dataset)
        test = EvaluationSet(dataset=datasets.dataset_ref(asked, artifacts, like=training), rows=check.test.rows)
    train = None
    if model.recipe is not None:
        train = await banks.train_spec(session, model, training, replay.left_out, settings, artifacts)
    return UnlearnSpec(
        index=artifacts.open(index.artifact or ""),
        fit=await indexes.fit_spec(session, index.id, settings, artifacts),
        forget=request.forget.rows or [],
        method=request.method,
        baselines=check.baselines if check else [],
        train=train,
        oracles=check.oracles if check else 0,
        semantics=check.semantics if check else "resample",
        test=test,
    )


async def unlearned_sources(
    session: AsyncSession, replay_id: str
) -> tuple[UnlearnedCreate, dict[str, Checkpoint], Json]:
    """Return what an unlearning was asked, the checkpoints it starts from by id, and the skeleton that new ones must fit."""
    replay = await find(session, "unlearning", replay_id)
    index = await indexes.find(session, replay.index_id or "")
    model = await models.find(session, replay.model_id)
    sources = await models.checkpoints_by_id(session, model.id, index.checkpoint_ids)
    request = UnlearnedCreate.model_validate(replay.request)
    return request, {source.id: source for source in sources}, model.parameters


async def finish_unlearning(
    session: AsyncSession,
    replay_id: str,
    made: Sequence[tuple[CheckpointMeta, str, WeightsSummary, Json]],
    comparison: Json | None,
) -> None:
    """Register unlearned checkpoints, given with their ids and `{source, report}`.

    Raises:
        Conflict: if checkpoints of such a run were uploaded meanwhile.
    """
    replay = await find(session, "unlearning", replay_id, lock=True)
    for meta, checkpoint_id, summary, _ in made:
        await models.register_checkpoint(session, replay.model_id, meta, checkpoint_id, summary)
    replay.status, replay.error = "succeeded", None
    shown = [{"checkpoint": checkpoint_id, **facts} for _, checkpoint_id, _, facts in made]
    replay.result = {"checkpoints": shown, "comparison": comparison}


async def finish_training(
    session: AsyncSession,
    replay_id: str,
    trained: Sequence[tuple[CheckpointMeta, str, WeightsSummary]],
    diverged: Sequence[int],
) -> None:
    """Register the checkpoints of a training, given with their ids.

    Raises:
        Conflict: if checkpoints of such a run were uploaded meanwhile.
    """
    replay = await find(session, "training", replay_id, lock=True)
    request = TrainingCreate.model_validate(replay.request)
    runs = {
        seed: TrainedRun(seed=seed, run=f"{request.run}-{seed}", checkpoints=[], diverged=seed in diverged)
        for seed in request.seeds
    }
    for meta, checkpoint_id, summary in trained:
        await models.register_checkpoint(session, replay.model_id, meta, checkpoint_id, summary)
        runs[meta.seed or 0].checkpoints.append(checkpoint_id)
    replay.status, replay.error = "succeeded", None
    replay.result = {"runs": [run.model_dump() for run in runs.values()]}


async def finish_evaluation(
    session: AsyncSession, replay_id: str, artifact: str, quality: Json, calibration: Json | None
) -> None:
    """Make an evaluation's result its index's quality, if the generation that it measured is still the one that answers."""
    replay = await find(session, "evaluation", replay_id, lock=True)
    replay.status, replay.error, replay.result = "succeeded", None, quality
    quality = {**quality, "evaluation": replay.id}
    await indexes.set_quality(session, replay.index_id or "", artifact, quality, calibration)


async def finish_verification(session: AsyncSession, replay_id: str, result: Json) -> None:
    """Keep a verification's result."""
    replay = await find(session, "verification", replay_id, lock=True)
    replay.status, replay.error, replay.result = "succeeded", None, result


async def find(session: AsyncSession, kind: str, replay_id: str, *, lock: bool = False) -> Replay:
    """Return a replay of a kind.

    Raises:
        NotFound: if there is none.
    """
    replay = await repository.find(session, kind, replay_id, lock=lock)
    if replay is None:
        raise NotFound(f"There is no {kind} {replay_id[:64]!r}.")
    return replay


async def find_of_index(session: AsyncSession, kind: str, index: str, replay_id: str) -> Replay:
    """Return a replay of an index.

    Raises:
        NotFound: if the index has none of that id.
    """
    found, replay = await indexes.find(session, index), await find(session, kind, replay_id)
    if replay.index_id != found.id:
        raise NotFound(f"Index {found.name!r} has no {kind} {replay_id[:64]!r}.")
    return replay


async def find_training(session: AsyncSession, model: str, replay_id: str) -> Replay:
    """Return a training of a model.

    Raises:
        NotFound: if the model has none of that id.
    """
    found, replay = await models.find(session, model), await find(session, "training", replay_id)
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


async def fail_replay(session: AsyncSession, replay_id: str, error: Json) -> None:
    """Record why a replay failed; it may have been deleted meanwhile."""
    await _set_status(session, replay_id, "failed", error)


async def begin_replay(session: AsyncSession, replay_id: str) -> None:
    """Record that a replay is tried again."""
    await _set_status(session, replay_id, "running", None)


async def _set_status(session: AsyncSession, replay_id: str, status: str, error: Json | None) -> None:
    for kind in _PREFIXES:
        replay = await repository.find(session, kind, replay_id, lock=True)
        if replay is not None:
            replay.status, replay.error = status, error


async def _replayable(
    session: AsyncSession, resources: Resources, reference: str
) -> tuple[Index, Model, Dataset, TrainSpec]:
    index = await indexes.find_ready(session, reference)
    model = await models.find(session, index.model_id)
    training = await datasets.find_ready(session, index.dataset_id)
    left_out = await datasets.deleted_rows(session, training.id)
    spec = await banks.train_spec(session, model, training, left_out, resources.settings, resources.artifacts)
    return index, model, training, spec


async def _index_of(session: AsyncSession, replay: Replay) -> Index:
    """Return the index that a replay is about.

    Raises:
        Conflict: if it went over to another version of its data set since.
    """
    index = await indexes.find_ready(session, replay.index_id or "")
    if index.dataset_id != replay.dataset_id:
        raise Conflict(f"Index {index.name!r} was extended to another version of its data set meanwhile: ask again.")
    return index


async def _submitted(
    session: AsyncSession,
    kind: JobKind,
    body: Json,
    model: Model,
    dataset: Dataset,
    left_out: list[int],
    index: Index | None,
) -> tuple[Replay, Job]:
    replay = Replay(
        id=new_id(_PREFIXES[kind]),
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


async def _rivals(session: AsyncSession, index: Index, request: EvaluationCreate) -> list[Index]:
    """Return the indexes that a tuned evaluation compares with.

    Raises:
        InvalidRequest: if one is of another model, data set or measurement, or scores only named queries.
    """
    rivals = []
    for place, reference in enumerate(request.tune.candidates if isinstance(request.tune, TuneSpec) else []):
        rival = await indexes.find_ready(session, reference)
        same = all(getattr(rival, name) == getattr(index, name) for name in ("model_id", "dataset_id", "measurement"))
        if not same or METHODS[rival.method["type"]].keeps != "features":
            raise InvalidRequest(
                "A candidate scores any query of the same model, data set and measurement.",
                pointer=f"/tune/candidates/{place}",
            )
        rivals.append(rival)
    return rivals


def _rows_of(asked: QuerySet, dataset: Dataset, deleted: list[int], pointer: str) -> list[int]:
    total = dataset.num_examples or 0
    if asked.rows is None:
        rows = np.setdiff1d(np.arange(total), np.asarray(deleted, np.int64))
        places = np.linspace(0, len(rows) - 1, min(asked.count, len(rows))).round().astype(int)
        return [int(row) for row in rows[np.unique(places)]]
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


for _kind in _PREFIXES:
    jobs.RESOURCES[_kind] = jobs.Resource(begin_replay, fail_replay)
