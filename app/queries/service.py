"""From questions to engine calls and back: the mathematics is done there."""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets import service as datasets
from app.db.tables import Dataset, Index
from app.errors import CorruptArtifact, InvalidCursor, InvalidRequest
from app.indexes import service as indexes
from app.queries.questions import Asked, engine_dataset, engine_subset, group_question, resolved
from app.queries.schemas import (
    Attributed,
    AttributionAnswer,
    AttributionRequest,
    AttributionResult,
    CounterfactualAnswer,
    CounterfactualRequest,
    CounterfactualResult,
    Output,
    Prediction,
    SelfInfluence,
    SetOutput,
    UnlearningAnswer,
    UnlearningRequest,
    UnlearningResult,
)
from app.web.deps import release
from app.web.pagination import Page, PageOf, next_cursor
from app.web.resources import Resources
from attribution_core.method_spec import METHODS
from attribution_core.sampling import evenly_spread
from attribution_core.spec import Selector

Json = dict[str, Any]
SAMPLED_EXAMPLES = 32


async def _answered(
    session: AsyncSession,
    resources: Resources,
    operation: str,
    payload: Json,
    index: Index,
    queried: Iterable[str] = (),
) -> Json:
    """Return the engine's answer about an index and the data sets of its queries.

    Raises:
        NotFound: if one of these was deleted meanwhile.
        CorruptArtifact: if stored files are damaged.
    """
    try:
        return await resources.engine.call(operation, payload)
    except CorruptArtifact:
        await indexes.find(session, index.id)
        for dataset in queried:
            await datasets.find(session, dataset)
        raise


async def attributions(
    session: AsyncSession, resources: Resources, reference: str, request: AttributionRequest
) -> AttributionAnswer:
    """Return the top training examples of both signs for every query."""
    began = time.perf_counter()
    if request.top_k > resources.settings.limits.max_top_k:
        raise InvalidRequest(f"top_k may be up to {resources.settings.limits.max_top_k}.", pointer="/top_k")
    asked = await resolved(session, resources.settings, resources.artifacts, reference, request)
    condition = None if request.filter is None else request.filter.model_dump(mode="json", by_alias=True)
    payload = {**asked.engine, "top_k": request.top_k, "filter": condition}
    found = await _answered(session, resources, "attribute", payload, asked.index, asked.queried)

    def listed(entries: list[Json]) -> list[Attributed]:
        return [
            Attributed(
                **{key: entry[key] for key in ("row", "id", "score", "target")},
                metadata=entry["metadata"] if "metadata" in request.include else None,
                preview=datasets.preview_path(asked.training.id, entry["row"])
                if "preview" in request.include
                else None,
            )
            for entry in entries
        ]

    results = [
        AttributionResult(
            query=query,
            output=Output(**result["output"]),
            positive=listed(result["positive"]),
            negative=listed(result["negative"]),
        )
        for query, result in zip(asked.queries, found["results"], strict=True)
    ]
    return AttributionAnswer(results=results, **_said(asked, found, began))


async def counterfactuals(
    session: AsyncSession, resources: Resources, reference: str, request: CounterfactualRequest
) -> CounterfactualAnswer:
    """Predict every query's output after training on each changed set."""
    began = time.perf_counter()
    if len(request.subsets) > resources.settings.limits.max_subsets:
        raise InvalidRequest(f"A request may have {resources.settings.limits.max_subsets} subsets.", pointer="/subsets")
    asked = await resolved(session, resources.settings, resources.artifacts, reference, request)
    payload = {
        **asked.engine,
        "subsets": [engine_subset(subset) for subset in request.subsets],
        **group_question(asked, request.estimator, request.interval),
    }
    found = await _answered(session, resources, "predict", payload, asked.index, asked.queried)
    results = [
        CounterfactualResult(
            query=query,
            output=Output(**output),
            predictions=[
                Prediction(subset=number, predicted=output["value"] + entry["change"], **entry)
                for number, entry in enumerate(predictions)
            ],
        )
        for query, output, predictions in zip(asked.queries, found["outputs"], found["predictions"], strict=True)
    ]
    return CounterfactualAnswer(estimator=request.estimator, results=results, **_said(asked, found, began))


async def check_predictable(
    session: AsyncSession, resources: Resources, reference: str, request: CounterfactualRequest
) -> list[int | None]:
    """Return how many examples each subset leaves out, null where it depends on the query; nothing is answered.

    Raises:
        InvalidRequest: naming the query or subset that does not fit the index.
    """
    asked = await resolved(session, resources.settings, resources.artifacts, reference, request)
    payload = {**asked.engine, "subsets": [engine_subset(subset) for subset in request.subsets]}
    found = await _answered(session, resources, "check_predictable", payload, asked.index, asked.queried)
    removed: list[int | None] = found["removed"]
    return removed


async def check_answers(
    session: AsyncSession, resources: Resources, index: Index, dataset: Dataset, rows: list[int]
) -> None:
    """Refuse rows that an index has no answer for: it may know those alone that were named when it was made.

    Raises:
        InvalidRequest: naming the queries.
    """
    if "queries" not in METHODS[index.method["type"]].needs:
        return
    fit = await indexes.fit_spec(session, index.id, resources.settings, resources.artifacts)
    training = await datasets.find_ready(session, index.dataset_id)
    payload = {
        "artifact": index.artifact,
        "fit": fit.model_dump(mode="json", by_alias=True),
        "deleted": [],
        "queries": [{**engine_dataset(resources.artifacts, dataset, training), "rows": rows}],
        "damping": None,
        "subsets": [],
    }
    await _answered(session, resources, "check_predictable", payload, index, [dataset.id])


async def unlearning(
    session: AsyncSession, resources: Resources, reference: str, request: UnlearningRequest
) -> UnlearningAnswer:
    """Predict every query's output as if the forget set had never been trained on.

    Samples of the forgotten and of the kept examples are asked the same beside the queries.

    Raises:
        InvalidRequest: if the index has no scores of those samples, or the question does not fit it.
    """
    began = time.perf_counter()
    asked = await resolved(session, resources.settings, resources.artifacts, reference, request)
    method = METHODS[asked.index.method["type"]]
    if method.keeps == "scores":
        raise InvalidRequest(
            f"Index {asked.index.name!r} answers for queries named when it was made, and an unlearning estimate asks about "
            "training examples too: ask for counterfactuals without the forget set.",
            pointer="/forget",
        )
    forget = request.forget.model_dump(mode="json", by_alias=True, exclude_none=True)
    subset = {"selector": forget, "keep": False}
    rows = await _selected_rows(session, resources, asked.index, asked.engine, forget)
    kept = np.setdiff1d(
        np.arange(asked.training.num_examples or 0), np.asarray([*rows, *asked.deleted], dtype=np.int64)
    )
    if not len(kept):
        raise InvalidRequest("The forget set is the whole training set.", pointer="/forget")
    sets = (np.asarray(rows, dtype=np.int64), kept)
    samples = [part[evenly_spread(len(part), SAMPLED_EXAMPLES)] for part in sets]
    training = {key: asked.engine["training"][key] for key in ("folder", "spec")}
    extra = [{**training, "rows": sample.tolist()} for sample in samples if len(sample)]
    payload = {
        **asked.engine,
        "queries": [*asked.engine["queries"], *extra],
        "subsets": [subset],
        **group_question(asked, request.estimator, request.interval),
    }
    found = await _answered(session, resources, "predict", payload, asked.index, asked.queried)
    values = np.array([output["value"] for output in found["outputs"]])
    changes = [predictions[0] for predictions in found["predictions"]]
    predicted = values + np.array([entry["change"] for entry in changes])
    count = len(asked.queries)
    middle = count + len(samples[0])
    results = [
        UnlearningResult(
            query=query,
            output=Output(**found["outputs"][number]),
            predicted=predicted[number],
            **{key: changes[number][key] for key in ("change", "interval", "calibrated")},
        )
        for number, query in enumerate(asked.queries)
    ]
    return UnlearningAnswer(
        estimator=request.estimator,
        forget_size=len(rows),
        results=results,
        forget_set=_set_output(values[count:middle], predicted[count:middle]),
        retain_sample=_set_output(values[middle:], predicted[middle:]),
        **_said(asked, found, began),
    )


async def forgotten_rows(session: AsyncSession, resources: Resources, index: Index, selector: Selector) -> list[int]:
    """Return the training rows of an index that a selector names; they do not depend on a query."""
    fit = await indexes.fit_spec(session, index.id, resources.settings, resources.artifacts)
    deleted = await datasets.deleted_rows(session, index.dataset_id)
    payload = {"artifact": index.artifact, "fit": fit.model_dump(mode="json", by_alias=True), "deleted": deleted}
    dumped = selector.model_dump(mode="json", by_alias=True, exclude_none=True)
    return await _selected_rows(session, resources, index, payload, dumped)


async def _selected_rows(
    session: AsyncSession, resources: Resources, index: Index, engine: Json, selector: Json
) -> list[int]:
    """Return the training rows that a selector names."""
    payload = {key: engine[key] for key in ("artifact", "fit", "deleted")} | {"selector": selector}
    rows: list[int] = (await _answered(session, resources, "select", payload, index))["rows"]
    return rows


async def self_influence(
    session: AsyncSession, resources: Resources, reference: str, page: Page, order: str
) -> PageOf[SelfInfluence]:
    """Return one page of training examples by their influence on themselves."""
    index = await indexes.find_ready(session, reference)
    route = f"self-influence:{index.id}:{index.generation}:{order}"
    after = page.number_after(route)
    fit = await indexes.fit_spec(session, index.id, resources.settings, resources.artifacts)
    training = await datasets.find_ready(session, index.dataset_id)
    if after is not None and after >= (training.num_examples or 0):
        raise InvalidCursor("The cursor is not one of this service.", pointer="/query/cursor")
    payload = {
        "artifact": index.artifact,
        "fit": fit.model_dump(mode="json", by_alias=True),
        "deleted": await datasets.deleted_rows(session, training.id),
        "order": order,
        "after": after,
        "limit": page.limit,
    }
    await release(session)
    found = await _answered(session, resources, "self_influence", payload, index)
    async with datasets.unless_deleted(session, training):
        reader = datasets.reader_of(resources.artifacts, training)
        described = await asyncio.to_thread(reader.describe, np.asarray(found["rows"], dtype=np.int64))
    items = [
        SelfInfluence(**entry, score=score, preview=datasets.preview_path(training.id, entry["row"]))
        for entry, score in zip(described, found["scores"], strict=True)
    ]
    return PageOf[SelfInfluence](items=items, next=next_cursor(route, items[-1].row) if found["more"] else None)


def _set_output(values: np.ndarray, predicted: np.ndarray) -> SetOutput:
    count = len(values)
    return SetOutput(
        size=count,
        mean_output=float(values.mean()) if count else 0.0,
        mean_predicted=float(predicted.mean()) if count else 0.0,
    )


def _said(asked: Asked, found: Json, began: float) -> Json:
    """Return what an answer says about itself."""
    method = asked.index.method
    return {
        "index": asked.index.id,
        "method": method["type"],
        "notion": METHODS[method["type"]].notion,
        "measurement": asked.index.measurement,
        "damping": found["damping"],
        "approximate": found["approximate"],
        "recall": found["recall"],
        "generation": asked.index.generation,
        "drift": asked.index.drift["value"] if asked.index.drift else None,
        "quality": asked.index.quality,
        "elapsed_ms": round(1000 * (time.perf_counter() - began), 1),
    }
