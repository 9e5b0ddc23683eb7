"""Trainings, evaluations, verifications and unlearned checkpoints."""

from fastapi import APIRouter, Response

from app.errors import OF_BODIES, OF_ENGINE, Conflict, CorruptArtifact, NotFound, NotReady, RecipeMissing, problems
from app.jobs.schemas import JobOut
from app.jobs.service import shown as shown_job
from app.replay import service
from app.replay.schemas import (
    EvaluationCreate,
    EvaluationOut,
    TrainingCreate,
    TrainingOut,
    UnlearnedCreate,
    UnlearnedOut,
    VerificationCreate,
    VerificationOut,
)
from app.web.boundary import TransactionalRoute
from app.web.deps import IdempotencyKey, PageDep, PreferWait, ResourcesDep, SessionDep, require
from app.web.pagination import PageOf

router = APIRouter(tags=["replay"], route_class=TransactionalRoute)
_REFUSALS = problems(NotFound, NotReady, RecipeMissing, Conflict, *OF_BODIES, *OF_ENGINE, CorruptArtifact)


@router.post(
    "/models/{model}/trainings",
    summary="Train a model",
    status_code=202,
    response_model=JobOut,
    dependencies=[require("write")],
    responses={200: {"model": TrainingOut, "description": "The training, with `Prefer: wait`."}, **_REFUSALS},
)
async def create_training(
    response: Response,
    session: SessionDep,
    resources: ResourcesDep,
    model: str,
    training: TrainingCreate,
    _key: IdempotencyKey = None,
    _prefer: PreferWait = None,
) -> JobOut:
    """Train a model from its recipe with several seeds; the checkpoints appear together when all are whole.

    The same recipe, data and seed give the same weights, to the bit on one device.
    """
    _, job = await service.create_training(session, resources, model, training)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return shown_job(job)


@router.get(
    "/models/{model}/trainings", summary="List trainings", dependencies=[require("read")], responses=problems(NotFound)
)
async def list_trainings(session: SessionDep, page: PageDep, model: str) -> PageOf[TrainingOut]:
    """Return a model's trainings, newest first."""
    return await service.trainings(session, model, page)


@router.get(
    "/models/{model}/trainings/{training}",
    summary="Get a training",
    dependencies=[require("read")],
    responses=problems(NotFound),
)
async def get_training(session: SessionDep, model: str, training: str) -> TrainingOut:
    """Return one training with the checkpoints it gave, and which seeds diverged."""
    return service.shown_training(await service.find_training(session, model, training))


@router.post(
    "/indexes/{index}/evaluations",
    summary="Measure an index",
    status_code=202,
    response_model=JobOut,
    dependencies=[require("write")],
    responses={200: {"model": EvaluationOut, "description": "The evaluation, with `Prefer: wait`."}, **_REFUSALS},
)
async def create_evaluation(
    response: Response,
    session: SessionDep,
    resources: ResourcesDep,
    index: str,
    evaluation: EvaluationCreate,
    _key: IdempotencyKey = None,
    _prefer: PreferWait = None,
) -> JobOut:
    """Measure an index's predictions against real retraining; the result becomes its `quality` and is in each answer.

    Retrainings belong to the model's recipe, the data set and the protocol: another index's evaluation finds them done.
    """
    _, job = await service.create_evaluation(session, resources, index, evaluation)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return shown_job(job)


@router.get(
    "/indexes/{index}/evaluations",
    summary="List evaluations",
    dependencies=[require("read")],
    responses=problems(NotFound),
)
async def list_evaluations(session: SessionDep, page: PageDep, index: str) -> PageOf[EvaluationOut]:
    """Return an index's evaluations, newest first."""
    return await service.evaluations(session, index, page)


@router.get(
    "/indexes/{index}/evaluations/{evaluation}",
    summary="Get an evaluation",
    dependencies=[require("read")],
    responses=problems(NotFound),
)
async def get_evaluation(session: SessionDep, index: str, evaluation: str) -> EvaluationOut:
    """Return one evaluation: what was asked and what was measured, with its protocol."""
    return service.shown_evaluation(await service.find_of_index(session, "evaluation", index, evaluation))


@router.post(
    "/indexes/{index}/verifications",
    summary="Verify predictions",
    status_code=202,
    response_model=JobOut,
    dependencies=[require("write")],
    responses={200: {"model": VerificationOut, "description": "The verification, with `Prefer: wait`."}, **_REFUSALS},
)
async def create_verification(
    response: Response,
    session: SessionDep,
    resources: ResourcesDep,
    index: str,
    verification: VerificationCreate,
    _key: IdempotencyKey = None,
    _prefer: PreferWait = None,
) -> JobOut:
    """Retrain without chosen examples over several seeds; the predicted change stands beside the realised one and its noise."""
    _, job = await service.create_verification(session, resources, index, verification)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return shown_job(job)


@router.get(
    "/indexes/{index}/verifications",
    summary="List verifications",
    dependencies=[require("read")],
    responses=problems(NotFound),
)
async def list_verifications(session: SessionDep, page: PageDep, index: str) -> PageOf[VerificationOut]:
    """Return an index's verifications, newest first."""
    return await service.verifications(session, index, page)


@router.get(
    "/indexes/{index}/verifications/{verification}",
    summary="Get a verification",
    dependencies=[require("read")],
    responses=problems(NotFound),
)
async def get_verification(session: SessionDep, index: str, verification: str) -> VerificationOut:
    """Return one verification: predicted beside realised changes, per query and subset."""
    return service.shown_verification(await service.find_of_index(session, "verification", index, verification))


@router.post(
    "/indexes/{index}/unlearned-checkpoints",
    summary="Unlearn",
    status_code=202,
    response_model=JobOut,
    dependencies=[require("write")],
    responses={200: {"model": UnlearnedOut, "description": "What was made, with `Prefer: wait`."}, **_REFUSALS},
)
async def create_unlearned_checkpoints(
    response: Response,
    session: SessionDep,
    resources: ResourcesDep,
    index: str,
    unlearned: UnlearnedCreate,
    _key: IdempotencyKey = None,
    _prefer: PreferWait = None,
) -> JobOut:
    """Make new checkpoints of the index's model without a forget set, and compare them with retrained ones where asked.

    They are marked as not final, so that no later index takes them for the model's own.
    """
    _, job = await service.create_unlearned(session, resources, index, unlearned)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return shown_job(job)


@router.get(
    "/indexes/{index}/unlearned-checkpoints",
    summary="List unlearnings",
    dependencies=[require("read")],
    responses=problems(NotFound),
)
async def list_unlearned_checkpoints(session: SessionDep, page: PageDep, index: str) -> PageOf[UnlearnedOut]:
    """Return an index's unlearnings, newest first."""
    return await service.unlearnings(session, index, page)


@router.get(
    "/indexes/{index}/unlearned-checkpoints/{unlearning}",
    summary="Get an unlearning",
    dependencies=[require("read")],
    responses=problems(NotFound),
)
async def get_unlearned_checkpoints(session: SessionDep, index: str, unlearning: str) -> UnlearnedOut:
    """Return one unlearning: the checkpoints it made, and how they compare with retrained ones."""
    return service.shown_unlearned(await service.find_of_index(session, "unlearning", index, unlearning))
