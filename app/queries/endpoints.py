"""The questions an index answers."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from app.errors import OF_BODIES, OF_ENGINE, CorruptArtifact, NotFound, NotReady, problems
from app.queries import service
from app.queries.schemas import (
    AttributionAnswer,
    AttributionRequest,
    CounterfactualAnswer,
    CounterfactualRequest,
    SelfInfluence,
    UnlearningAnswer,
    UnlearningRequest,
)
from app.web.boundary import TransactionalRoute
from app.web.deps import IdempotencyKey, PageDep, ResourcesDep, SessionDep, require
from app.web.pagination import PageOf

router = APIRouter(prefix="/indexes/{index}", tags=["queries"], route_class=TransactionalRoute)
_POST = problems(NotFound, NotReady, *OF_BODIES, *OF_ENGINE, CorruptArtifact)


@router.post(
    "/attributions", summary="Which training examples are behind it?", dependencies=[require("query")], responses=_POST
)
async def attribute(
    session: SessionDep, resources: ResourcesDep, index: str, request: AttributionRequest, _: IdempotencyKey = None
) -> AttributionAnswer:
    """Return the training examples that raise each query's measurement most, and those that lower it most.

    A score is the predicted fall of the measurement had the example not been trained on.
    """
    return await service.attributions(session, resources, index, request)


@router.post(
    "/counterfactuals",
    summary="What if it had been trained on other data?",
    dependencies=[require("query")],
    responses=_POST,
)
async def predict_counterfactuals(
    session: SessionDep, resources: ResourcesDep, index: str, request: CounterfactualRequest, _: IdempotencyKey = None
) -> CounterfactualAnswer:
    """Predict the measurement after training on changed training sets.

    The prediction is the model's own output minus what the examples left out are worth: the sum of their scores, or with
    `estimator: newton` the effect of the group as a whole.
    """
    return await service.counterfactuals(session, resources, index, request)


@router.post(
    "/unlearning", summary="What if it had never seen these?", dependencies=[require("query")], responses=_POST
)
async def predict_unlearning(
    session: SessionDep, resources: ResourcesDep, index: str, request: UnlearningRequest, _: IdempotencyKey = None
) -> UnlearningAnswer:
    """Predict the measurement as if a forget set had never been trained on, for queries and for samples of both parts."""
    return await service.unlearning(session, resources, index, request)


@router.get(
    "/self-influence",
    summary="Which training examples are atypical?",
    dependencies=[require("query")],
    responses=problems(NotFound, NotReady, *OF_ENGINE, CorruptArtifact),
)
async def list_self_influence(
    session: SessionDep,
    resources: ResourcesDep,
    page: PageDep,
    index: str,
    order: Annotated[Literal["desc", "asc"], Query(description="`desc`: the most self-influential first.")] = "desc",
) -> PageOf[SelfInfluence]:
    """Return training examples by their influence on themselves; high values mark mislabelled or atypical ones."""
    return await service.self_influence(session, resources, index, page, order)
