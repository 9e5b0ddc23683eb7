"""What the engine can be asked, as functions of plain JSON values."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from app.engine.cache import IndexCache
from app.engine.checks import check_values
from attribution_core.architectures.build import describe_plugins, skeleton
from attribution_core.data.batch import Batch
from attribution_core.data.collate import ExampleSource
from attribution_core.data.reader import DatasetReader
from attribution_core.datamodel import predicted_change, removed_rows
from attribution_core.errors import InvalidInputError, located
from attribution_core.evaluate.served import ServedCalibration
from attribution_core.methods.answers import Attribution, Found, Query
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.opening import AnyIndex as Index
from attribution_core.spec import ArchitectureSpec, DatasetSpec, Filter, Selector
from attribution_core.training.spec import MODELS_PER_GROUP, TrainSpec
from attribution_core.training.trainer import Run, Trainer

Json = dict[str, Any]
_FILTER: TypeAdapter[Filter] = TypeAdapter(Filter)


class Operations:
    """The operations, over a cache of warm indexes."""

    def __init__(self, cache: IndexCache, rescore_rows: int) -> None:
        self._cache = cache
        self._rescore_rows = rescore_rows

    def run(self, operation: str, payload: Json) -> Json:
        """Run one operation."""
        match operation:
            case "describe_model":
                return describe_model(payload)
            case "describe_plugins":
                return {"plugins": describe_plugins()}
            case "training_seconds":
                return training_seconds(payload)
            case "attribute":
                return self.attribute([payload])[0]
            case "predict":
                return self.predict(payload)
            case "check_predictable":
                return self.check_predictable(payload)
            case "select":
                index = self._cache.get(payload["artifact"], payload["fit"])
                selector = Selector.model_validate(payload["selector"])
                with located("/forget"):
                    return {"rows": selected(index, selector, payload["deleted"]).tolist()}
            case "self_influence":
                return self.self_influence(payload)
        raise InvalidInputError(f"the engine has no operation {operation}")

    def attribute(self, payloads: Sequence[Json]) -> list[Json]:
        """Answer requests that differ in nothing but their queries, encoded as one batch."""
        first = payloads[0]
        index = self._cache.get(first["artifact"], first["fit"])
        batches = [_queries(index, payload["queries"]) for payload in payloads]
        allowed = _allowed(index, first["filter"], first["deleted"])
        answers: list[Json] = []
        for group in _same_shape(batches):
            query = index.query(Batch.joined([batches[number] for number in group]), first["damping"])
            found = index.attribute(query, first["top_k"], allowed, rescore=first["rescore"])
            start = 0
            for number in group:
                stop = start + len(batches[number])
                answers.append({"number": number, **_attributions(index, query, found[start:stop])})
                start = stop
        return sorted(answers, key=lambda answer: int(answer.pop("number")))

    def predict(self, payload: Json) -> Json:
        """Predict queries' measurements after training without each of several groups."""
        found, index = self.predictions(payload), self._cache.get(payload["artifact"], payload["fit"])
        return {
            "outputs": found.outputs,
            "predictions": [
                [
                    {"removed": len(rows), **self._judged(payload, change, spread, deviation, len(rows))}
                    for rows, change, spread, deviation in zip(*of_query, strict=True)
                ]
                for of_query in zip(
                    found.rows,
                    found.changes.tolist(),
                    found.spreads.tolist(),
                    found.deviations.tolist(),
                    strict=True,
                )
            ],
            "approximate": found.approximate,
            "recall": index.recall,
            "damping": found.damping,
        }

    def predictions(self, payload: Json) -> "Predictions":
        """Return the method's own predictions, before any calibration."""
        index = self._cache.get(payload["artifact"], payload["fit"])
        query = index.query(self.queries(payload), payload["damping"])
        shared = _shared(index, payload)
        effects, exact = np.zeros((len(query), len(payload["subsets"]))), True
        spreads, deviations = np.zeros_like(effects), np.zeros_like(effects)
        if shared:
            groups = list(shared.values())
            effects[:, list(shared)], exact = self._effects(index, query, groups, payload)
            spreads[:, list(shared)], deviations[:, list(shared)] = self._uncertain(index, query, groups, payload)
        # Per query, as top_positive and top_negative differ between queries.
        rows_of = [
            [shared.get(number, np.empty(0, np.int64)) for number in range(len(payload["subsets"]))]
            for _ in query.outputs
        ]
        for number, subset in enumerate(payload["subsets"]):
            if number not in shared:
                with located(_place(number, subset)):
                    per_query = _top(index, query, subset, payload)
                for place, rows in enumerate(per_query):
                    rows_of[place][number] = rows
                    one = query[place : place + 1]
                    part, exact_here = self._effects(index, one, [rows], payload)
                    effects[place, number], exact = part[0, 0], exact and exact_here
                    of_one = self._uncertain(index, one, [rows], payload)
                    spreads[place, number], deviations[place, number] = (found[0, 0] for found in of_one)
        change, damping = predicted_change(effects), _damping(index, query)
        return Predictions(query.outputs, change, spreads, deviations, rows_of, not exact, damping)

    def check_predictable(self, payload: Json) -> Json:
        """Refuse a question whose queries or subsets do not fit the index, and return how many examples each subset leaves out.

        Of a subset that depends on the query that is null. A query's own top examples are looked up only where they may be all that there are.
        """
        index = self._cache.get(payload["artifact"], payload["fit"])
        batch = self.queries(payload)
        if not isinstance(index, LoadedIndex):
            index.query(batch, payload["damping"])  # it may answer for named queries only
        shared = _shared(index, payload)
        for number, subset in enumerate(payload["subsets"]):
            if number not in shared and _may_leave_nothing(index, subset, payload):
                with located(_place(number, subset)):
                    _top(index, index.query(batch, payload["damping"]), subset, payload)
        return {
            "removed": [len(shared[number]) if number in shared else None for number in range(len(payload["subsets"]))]
        }

    def queries(self, payload: Json) -> Batch:
        """Return a question's queries as one batch."""
        return _queries(self._cache.get(payload["artifact"], payload["fit"]), payload["queries"])

    def self_influence(self, payload: Json) -> Json:
        """Return one page of training examples by their influence on themselves."""
        index = self._cache.get(payload["artifact"], payload["fit"])
        with located("/path/index"):
            scores = index.self_influence()
        keys = -scores if payload["order"] == "desc" else scores
        rows, after = _present(index, payload["deleted"]), payload["after"]
        if after is not None:  # the last row of the page before; it may have been deleted since
            rows = rows[(keys[rows] > keys[after]) | ((keys[rows] == keys[after]) & (rows > after))]
        page = rows[np.lexsort((rows, keys[rows]))][: payload["limit"]]
        return {"rows": page.tolist(), "scores": scores[page].tolist(), "more": len(rows) > len(page)}

    def _effects(self, index: Index, query: Query, groups: list[np.ndarray], payload: Json) -> tuple[np.ndarray, bool]:
        """Return group effects, and whether they are exact; very large groups are summed from stored features."""
        count = sum(len(rows) for rows in groups)
        small = count <= self._rescore_rows
        if payload["estimator"] == "newton":
            if not small:
                raise InvalidInputError(
                    f"the newton estimator takes up to {self._rescore_rows:,} examples, not {count:,}", "/estimator"
                )
            return index.newton_effects(query, groups), True
        rescore = payload["rescore"] and small
        return index.group_effects(query, groups, rescore=rescore), rescore or not index.rescores

    def _uncertain(
        self, index: Index, query: Query, groups: list[np.ndarray], payload: Json
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what intervals grow with, and the method's own standard deviations, (queries, groups); not a number where there are none."""
        nothing = np.full((len(query), len(groups)), np.nan)
        deviations = index.deviations(query, groups) if payload["estimator"] == "additive" else None
        if payload["calibration"] is None:
            return nothing, nothing if deviations is None else deviations
        if isinstance(index, LoadedIndex):
            small = sum(len(rows) for rows in groups) <= self._rescore_rows
            spreads = index.spreads(query, groups, rescore=payload["rescore"] and small)
        else:
            spreads = index.spreads(query, groups)
        return spreads, nothing if deviations is None else deviations

    @staticmethod
    def _judged(payload: Json, change: float, spread: float, deviation: float, removed: int) -> Json:
        """Return a prediction as calibrated by an evaluation; else as the method has it, with the interval of its own posterior."""
        if payload["calibration"] is not None:
            calibration = ServedCalibration.from_json(payload["calibration"])
            found = calibration.predict(change, spread, removed, payload["interval"])
            if found["calibrated"]:
                return found
        if payload["interval"] is None or not np.isfinite(deviation):
            return {"change": change, "interval": None, "calibrated": False}
        half = NormalDist().inv_cdf((1 + payload["interval"]) / 2) * deviation
        return {"change": change, "interval": [change - half, change + half], "calibrated": False}


@dataclass(frozen=True)
class Predictions:
    """What a method predicts for training without groups of examples.

    Attributes:
        outputs: of the model, per query.
        changes: of the measurement, (queries, subsets).
        spreads: what calibrated intervals grow with, (queries, subsets).
        deviations: the method's own standard deviations, (queries, subsets); not a number for methods that do not know.
        rows: what is left out, per query and subset, ascending.
        approximate: whether some group was summed from stored features.
        damping: that was used; None for methods without.
    """

    outputs: list[Json]
    changes: np.ndarray
    spreads: np.ndarray
    deviations: np.ndarray
    rows: list[list[np.ndarray]]
    approximate: bool
    damping: float | None


def describe_model(payload: Json) -> Json:
    """Return what a model's checkpoints must hold."""
    parameters = skeleton(ArchitectureSpec.model_validate(payload["architecture"]))
    count = sum(int(np.prod(entry["shape"])) for entry in parameters.values() if not entry.get("tied_to"))
    return {"parameters": parameters, "num_parameters": count}


def training_seconds(payload: Json) -> Json:
    """Return the wall time of one step of one model, when as many are trained at once as a bank's groups hold."""
    spec = TrainSpec.model_validate(payload["train"])
    trainer = Trainer(spec)
    runs = [Run(spec.everything(), seed) for seed in range(min(MODELS_PER_GROUP, trainer.models_at_once()))]
    steps = spec.recipe.num_steps(spec.num_training)
    return {"seconds_per_step": trainer.estimate_seconds(runs) / (steps * len(runs))}


def _shared(index: Index, payload: Json) -> dict[int, np.ndarray]:
    """Return which rows are left out by the subsets that do not depend on a query, by the subsets' numbers."""
    shared: dict[int, np.ndarray] = {}
    for number, subset in enumerate(payload["subsets"]):
        selector = Selector.model_validate(subset["selector"])
        if selector.top_positive is None and selector.top_negative is None:
            with located(_place(number, subset)):
                rows = selected(index, selector, payload["deleted"])
                shared[number] = _left_out(index, subset, rows, payload["deleted"])
    return shared


def _place(number: int, subset: Json) -> str:
    """Return where a request has a subset's selector."""
    return f"/subsets/{number}/{'keep' if subset['keep'] else 'remove'}"


def selected(index: Index, selector: Selector, deleted: Sequence[int] = ()) -> np.ndarray:
    """Return the training rows a selector names, for selectors that do not depend on a query.

    Raises:
        InvalidInputError: if a row or id does not exist, or was deleted.
    """
    reader = index.context.source.reader
    if selector.where is not None:
        return np.setdiff1d(reader.matching(selector.where), _rows(deleted))
    named = _rows(selector.rows or []) if selector.ids is None else reader.rows_of_ids(selector.ids)
    rows = np.unique(named)
    gone = np.intersect1d(rows, _rows(deleted))
    if len(gone):
        raise InvalidInputError(f"training row {gone[0]} was deleted")
    if len(rows) and rows[-1] >= reader.num_examples:
        raise InvalidInputError(f"training row {rows[-1]} does not exist: there are {reader.num_examples}")
    return rows


def _rows(rows: Sequence[int]) -> np.ndarray:
    return np.asarray(rows, dtype=np.int64)


def _present(index: Index, deleted: Sequence[int]) -> np.ndarray:
    """Return the rows that were not deleted, ascending."""
    return np.setdiff1d(np.arange(index.num_examples), _rows(deleted))


def _left_out(index: Index, subset: Json, rows: np.ndarray, deleted: Sequence[int]) -> np.ndarray:
    n = index.num_examples
    left_out = removed_rows(n, keep=rows) if subset["keep"] else removed_rows(n, remove=rows)
    left_out = np.setdiff1d(left_out, _rows(deleted))  # they are no part of what a subset changes
    if len(left_out) == n - len(deleted):
        raise InvalidInputError("nothing would be left to train on")
    return left_out


def _may_leave_nothing(index: Index, subset: Json, payload: Json) -> bool:
    """Return whether the top examples of a query may be all examples, or none where only they are kept."""
    selector = Selector.model_validate(subset["selector"])
    wanted = selector.top_positive or selector.top_negative or 0
    return bool(subset["keep"]) or wanted >= len(_present(index, payload["deleted"]))


def _top(index: Index, query: Query, subset: Json, payload: Json) -> list[np.ndarray]:
    """Return per query the rows left out when a subset names each query's own top examples."""
    selector = Selector.model_validate(subset["selector"])
    wanted = min(selector.top_positive or selector.top_negative or 0, index.num_examples)
    allowed = _allowed(index, None, payload["deleted"])
    found = index.attribute(query, wanted, allowed, rescore=payload["rescore"])
    picked = [one.positive.rows if selector.top_positive else one.negative.rows for one in found]
    return [_left_out(index, subset, np.sort(rows), payload["deleted"]) for rows in picked]


@lru_cache(maxsize=64)
def _reader(folder: str, spec: str) -> DatasetReader:
    return DatasetReader(Path(folder), DatasetSpec.model_validate_json(spec), keep_groups=False)


def _queries(index: Index, queries: Sequence[Json]) -> Batch:
    """Return all queries of a request as one batch, in their order."""
    parts: list[Batch] = []
    source = index.context.source
    for number, query in enumerate(queries):
        if "example" in query:
            parts.append(_located(number, lambda query=query, first=number: source.inline([query["example"]], first)))
        else:
            reader = _reader(query["folder"], query["spec"])
            of_data = ExampleSource(reader, source.task, source.tokenizer, source.device)
            parts.append(_located(number, lambda query=query, of_data=of_data: of_data.batch(query["rows"])))
        check_values(index.context.spec, parts[-1], number, query)
    return Batch.joined(parts)


def _located(number: int, make: Any) -> Batch:
    try:
        batch: Batch = make()
    except InvalidInputError as error:
        raise InvalidInputError(str(error), error.pointer or f"/queries/{number}") from None
    return batch


def _same_shape(batches: Sequence[Batch]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, batch in enumerate(batches):
        groups.setdefault((*batch.inputs.shape[1:], batch.targets is None), []).append(number)
    return list(groups.values())


def _allowed(index: Index, condition: Json | None, deleted: Sequence[int]) -> np.ndarray | None:
    if condition is None and not deleted:
        return None
    mask = np.full(index.num_examples, condition is None)
    if condition is not None:
        mask[index.context.source.reader.matching(_FILTER.validate_python(condition))] = True
    mask[_rows(deleted)] = False
    return mask


def _damping(index: Index, query: Query) -> float | None:
    """Return the damping that a query was scored with; None where the method has none, whatever was asked."""
    return None if index.default_damping is None else query.damping


def _attributions(index: Index, query: Query, found: Sequence[Attribution]) -> Json:
    return {
        "results": [
            {"output": one.output, "positive": _listed(index, one.positive), "negative": _listed(index, one.negative)}
            for one in found
        ],
        "approximate": any(one.approximate for one in found),
        "recall": index.recall,
        "damping": _damping(index, query),
    }


def _listed(index: Index, found: Found) -> list[Json]:
    examples = index.context.source.reader.describe(found.rows)
    return [{**entry, "score": score} for entry, score in zip(examples, found.scores.tolist(), strict=True)]
