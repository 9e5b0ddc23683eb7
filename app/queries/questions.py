"""Questions with everything they refer to, in the engine's own form."""

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets import service as datasets
from app.db.tables import Dataset, Index
from app.errors import InvalidRequest
from app.indexes import service as indexes
from app.models import service as models
from app.queries.schemas import QueryOut, QuerySelection, Question, Subset
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from app.web.deps import release
from attribution_core.method_spec import METHODS, GroupEstimator

Json = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A question with everything it refers to.

    Attributes:
        engine: the question in the engine's own form.
        damping: what the index was tuned to, if it was.
    """

    index: Index
    training: Dataset
    engine: Json
    queries: list[QueryOut]
    deleted: list[int]

    @property
    def damping(self) -> float | None:
        """The damping that the index's evaluation chose; None if it did not."""
        return tuned_damping(self.index)

    @property
    def queried(self) -> set[str]:
        """The data sets of its queries."""
        return {query.dataset for query in self.queries if query.dataset is not None}


async def resolved(
    session: AsyncSession, settings: Settings, artifacts: ArtifactStore, reference: str, request: Question
) -> Asked:
    """Find what a question refers to, then give the connection back.

    Raises:
        NotFound: if something it names does not exist.
        NotReady: if the index or a data set is still being made.
        InvalidRequest: if the queries do not fit the model, or are too many.
    """
    index = await indexes.find_ready(session, reference)
    model = await models.find(session, index.model_id)
    training = await datasets.find_ready(session, index.dataset_id)
    fit = await indexes.fit_spec(session, index.id, settings, artifacts)
    asked: list[QueryOut] = []
    queries: list[Json] = []
    _check_count(request, settings)
    for number, selection in enumerate(request.queries):
        if selection.example is not None:
            queries.append({"example": selection.example.model_dump(mode="json")})
            asked.append(QueryOut(dataset=None, row=None, id=None, target=selection.example.target))
            continue
        dataset = await datasets.find_ready(session, selection.dataset or "")
        if dataset.spec["kind"] != training.spec["kind"]:
            raise InvalidRequest(
                f"The training set is {training.spec['kind']} data, this one {dataset.spec['kind']}.",
                pointer=f"/queries/{number}/dataset",
            )
        indexes.check_fits(model, dataset, f"/queries/{number}/dataset")
        gone = await datasets.deleted_rows(session, dataset.id)
        async with datasets.unless_deleted(session, dataset):
            queries.append({**engine_dataset(artifacts, dataset, training), "rows": selection.rows})
            # The first question about a data set reads every row's labels.
            asked += await asyncio.to_thread(_query_rows, artifacts, dataset, selection, number, gone)
    deleted = await datasets.deleted_rows(session, training.id)
    await release(session)
    engine = {
        "artifact": index.artifact,
        "fit": fit.model_dump(mode="json", by_alias=True),
        "training": engine_dataset(artifacts, training, training),
        "deleted": deleted,
        "queries": queries,
        "damping": tuned_damping(index) if request.damping is None else request.damping,
        "rescore": request.rescore,
    }
    return Asked(index, training, engine, asked, deleted)


def group_question(asked: Asked, estimator: GroupEstimator, interval: float | None) -> Json:
    """Return how a group's effect is to be predicted; a calibration serves only predictions of the kind it was fitted to.

    Raises:
        InvalidRequest: if the index's method has no such estimator.
    """
    calibrated = estimator == "additive" and asked.engine["rescore"] and asked.engine["damping"] == asked.damping
    calibration = asked.index.calibration if calibrated else None
    return {"estimator": _estimator(asked, estimator), "calibration": calibration, "interval": interval}


def _estimator(asked: Asked, estimator: GroupEstimator) -> GroupEstimator:
    """Return the estimator asked for, if the index's method has it."""
    method = asked.index.method["type"]
    if estimator not in METHODS[method].estimators:
        raise InvalidRequest(f"The method {method} has no {estimator} estimator; it is additive.", pointer="/estimator")
    return estimator


def tuned_damping(index: Index) -> float | None:
    """Return the damping that an evaluation chose for an index."""
    tuned = (index.quality or {}).get("tuned")
    return None if tuned is None else float(tuned["damping"])


def _check_count(request: Question, settings: Settings) -> None:
    count = sum(len(selection.rows or [0]) for selection in request.queries)
    if count > settings.limits.max_queries:
        raise InvalidRequest(
            f"A request may have {settings.limits.max_queries} queries, not {count}.", pointer="/queries"
        )


def engine_dataset(artifacts: ArtifactStore, dataset: Dataset, training: Dataset) -> Json:
    """Return where the engine finds a data set; its values are prepared as the training set's are."""
    assert dataset.artifact is not None
    same = {key: training.spec[key] for key in ("normalize", "max_length")}
    spec = datasets.spec_of(dataset).model_copy(update=same)
    return {"folder": str(artifacts.open(dataset.artifact)), "spec": spec.model_dump_json()}


def _query_rows(
    artifacts: ArtifactStore, dataset: Dataset, selection: QuerySelection, number: int, deleted: list[int]
) -> list[QueryOut]:
    rows = selection.rows or []
    outside = [place for place, row in enumerate(rows) if row >= (dataset.num_examples or 0)]
    if outside:
        pointer = f"/queries/{number}/rows/{outside[0]}"
        raise InvalidRequest(f"Data set {dataset.name!r} has {dataset.num_examples} rows.", pointer=pointer)
    gone = np.flatnonzero(np.isin(rows, deleted))
    if len(gone):
        pointer = f"/queries/{number}/rows/{gone[0]}"
        raise InvalidRequest(f"Row {rows[gone[0]]} of data set {dataset.name!r} was deleted.", pointer=pointer)
    described = datasets.reader_of(artifacts, dataset).describe(np.asarray(rows, dtype=np.int64))
    return [
        QueryOut(dataset=dataset.id, row=entry["row"], id=entry["id"], target=entry["target"]) for entry in described
    ]


def engine_subset(subset: Subset) -> Json:
    """Return a subset in the engine's own form."""
    selector = subset.keep or subset.remove
    assert selector is not None
    dumped = selector.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"selector": dumped, "keep": subset.keep is not None}
