"""What a worker needs to know of a replay, and what it reports."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from app.banks import service as banks
from app.datasets import service as datasets
from app.db.tables import Checkpoint, Dataset, Index, Job, Model, Replay
from app.errors import Conflict, InvalidRequest, NotFound
from app.indexes import service as indexes
from app.jobs import service as jobs
from app.models import service as models
from app.models.schemas import CheckpointMeta
from app.replay import repository
from app.replay.schemas import (
    EvaluationCreate,
    TrainedRun,
    TrainingCreate,
    UnlearnedCreate,
    VerificationCreate,
)
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from attribution_core.evaluate.spec import BankRef, EvaluationSpec, TuneSpec
from attribution_core.fit_spec import PriorRef
from attribution_core.method_spec import METHODS
from attribution_core.training.spec import Protocol, TrainSpec
from attribution_core.unlearning.spec import EvaluationSet, UnlearnSpec
from attribution_core.weights import WeightsSummary

Json = dict[str, Any]
PREFIXES = {"training": "trn", "evaluation": "eval", "verification": "ver", "unlearning": "unl"}


async def find(session: AsyncSession, kind: str, replay_id: str, *, lock: bool = False) -> Replay:
    """Return a replay of a kind.

    Raises:
        NotFound: if there is none.
    """
    replay = await repository.find(session, kind, replay_id, lock=lock)
    if replay is None:
        raise NotFound(f"There is no {kind} {replay_id[:64]!r}.")
    return replay


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


async def rivals(session: AsyncSession, index: Index, request: EvaluationCreate) -> list[Index]:
    """Return the indexes that a tuned evaluation compares with, kept from being deleted until the transaction ends.

    Raises:
        InvalidRequest: if one is of another model, data set or measurement, or scores only named queries.
    """
    rivals: list[Index] = []
    for place, reference in enumerate(request.tune.candidates if isinstance(request.tune, TuneSpec) else []):
        rival = await indexes.find_ready(session, reference, keep=True)
        same = all(getattr(rival, name) == getattr(index, name) for name in ("model_id", "dataset_id", "measurement"))
        if not same or METHODS[rival.method["type"]].keeps != "features":
            raise InvalidRequest(
                "A candidate scores any query of the same model, data set and measurement.",
                pointer=f"/tune/candidates/{place}",
            )
        if rival.id in {index.id, *(other.id for other in rivals)}:
            raise InvalidRequest(
                f"{rival.name!r} is compared already: the index itself always is.", pointer=f"/tune/candidates/{place}"
            )
        rivals.append(rival)
    return rivals


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
    replay, index, model, training = await _subject(session, "evaluation", replay_id)
    request = EvaluationCreate.model_validate(replay.request)
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
            for rival in await rivals(session, index, request)
        ],
    ), places


async def verification_plan(
    session: AsyncSession, replay_id: str, settings: Settings, artifacts: ArtifactStore
) -> tuple[Replay, VerificationCreate, TrainSpec]:
    """Return what a verification job was asked, and how its model is trained.

    Raises:
        NotFound: if it was deleted meanwhile.
    """
    replay, _, model, training = await _subject(session, "verification", replay_id)
    spec = await banks.train_spec(session, model, training, replay.left_out, settings, artifacts)
    return replay, VerificationCreate.model_validate(replay.request), spec


async def unlearning_plan(
    session: AsyncSession, replay_id: str, settings: Settings, artifacts: ArtifactStore
) -> UnlearnSpec:
    """Return what an unlearning job does.

    Raises:
        NotFound: if it was deleted meanwhile.
    """
    replay, index, model, training = await _subject(session, "unlearning", replay_id)
    request = UnlearnedCreate.model_validate(replay.request)
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
        await models.register_checkpoint(session, replay.model_id, meta, checkpoint_id, summary, "trained")
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
        await models.register_checkpoint(session, replay.model_id, meta, checkpoint_id, summary, "unlearned")
    replay.status, replay.error = "succeeded", None
    shown = [{"checkpoint": checkpoint_id, **facts} for _, checkpoint_id, _, facts in made]
    replay.result = {"checkpoints": shown, "comparison": comparison}


async def _subject(session: AsyncSession, kind: str, replay_id: str) -> tuple[Replay, Index, Model, Dataset]:
    """Return a replay of a kind with the index it is about, that one's model and its training set.

    Raises:
        NotFound: if it was deleted meanwhile.
        Conflict: if the index went over to another version of its data set since.
    """
    replay = await find(session, kind, replay_id)
    index = await indexes.find_ready(session, replay.index_id or "")
    if index.dataset_id != replay.dataset_id:
        raise Conflict(f"Index {index.name!r} was extended to another version of its data set meanwhile: ask again.")
    model = await models.find(session, replay.model_id)
    return replay, index, model, await datasets.find_ready(session, index.dataset_id)


async def fail_replay(session: AsyncSession, replay_id: str, error: Json) -> None:
    """Record why a replay failed; it may have been deleted meanwhile."""
    await _set_status(session, replay_id, "failed", error)


async def begin_replay(session: AsyncSession, job: Job) -> None:
    """Record that a replay is tried again.

    Raises:
        NotFound: if it, or something that it needs, was deleted.
        Conflict: if its index went over to another version of its data set, or its runs were made otherwise.
    """
    replay = await find(session, job.kind, job.resource_id, lock=True)
    if replay.dataset_id is None:
        raise NotFound("Its data set was deleted.")
    if replay.index_id is not None:
        await _subject(session, job.kind, replay.id)
    await keep_asked_datasets(session, replay.request)
    if replay.kind == "evaluation":
        index = await indexes.find(session, replay.index_id or "")
        await rivals(session, index, EvaluationCreate.model_validate(replay.request))
    if replay.kind == "training":
        asked = TrainingCreate.model_validate(replay.request)
        await refuse_runs(session, await models.find(session, replay.model_id), asked.run_names())
    replay.status, replay.error = "running", None


async def refuse_runs(session: AsyncSession, model: Model, names: Iterable[str]) -> None:
    """Refuse to make runs that a model has checkpoints of.

    Raises:
        Conflict: naming one.
    """
    taken = sorted(set(names) & await models.runs(session, model.id))
    if taken:
        raise Conflict(f"Model {model.name!r} has checkpoints of run {taken[0]!r}; name another `run`.", pointer="/run")


async def keep_asked_datasets(session: AsyncSession, request: Json) -> None:
    """Keep the data sets that a request names beside the training set from being deleted until the transaction ends.

    No row refers to them: only a job that is there already protects them from deletion.

    Raises:
        NotFound: if one was deleted.
    """
    places = [request.get("queries"), (request.get("check") or {}).get("test")]
    lists = [place if isinstance(place, list) else [place] for place in places]
    for reference in sorted({one["dataset"] for place in lists for one in place if one and one.get("dataset")}):
        await datasets.find_ready(session, reference, keep=True)


async def _set_status(session: AsyncSession, replay_id: str, status: str, error: Json | None) -> None:
    for kind in PREFIXES:
        replay = await repository.find(session, kind, replay_id, lock=True)
        if replay is not None:
            replay.status, replay.error = status, error


jobs.NEEDING.append(repository.jobs_needing)
for _kind in PREFIXES:
    jobs.RESOURCES[_kind] = jobs.Resource(begin_replay, fail_replay)
