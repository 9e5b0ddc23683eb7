"""An index that holds a score for every pair of a named query and a training example: methods whose scores no features can tell.

It answers as a `LoadedIndex` does, for the queries it was made for alone; those are recognised by their content.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from attribution_core.arrays import mapped_arrays, write_arrays
from attribution_core.data.batch import Batch
from attribution_core.errors import CorruptArtifactError, FingerprintMismatchError, InvalidInputError
from attribution_core.fit_spec import FitSpec, FitSummary
from attribution_core.methods.answers import Attribution, Query, top_rows
from attribution_core.methods.artifact import bytes_of, read_description, write_description
from attribution_core.methods.context import FitContext
from attribution_core.progress import Progress

SCORES_FILE = "scores.safetensors"


@dataclass(frozen=True)
class DenseScores:
    """What a dense index holds.

    Attributes:
        scores: (queries, n), in units of the measurement.
        keys: of the queries' contents, as `query_keys` returns them.
        outputs: `{"value", "prediction", "probability"}` per query.
        answers: which queries these are, in words, for who asks another.
        coverage: percentage of parameters attributed, layers covered and skipped; and what was measured on the way.
    """

    scores: np.ndarray
    keys: Sequence[str]
    outputs: Sequence[Mapping[str, Any]]
    answers: str
    coverage: Mapping[str, Any]

    def write(self, into: Path, spec: FitSpec) -> FitSummary:
        """Lay out the artifact in an empty folder.

        Raises:
            InvalidInputError: if a query has a score that is not finite.
        """
        unusable = np.flatnonzero(~np.isfinite(self.scores).all(axis=1))
        if len(unusable):
            raise InvalidInputError(f"query {unusable[0]} has no finite scores", "/method/queries")
        write_arrays(into / SCORES_FILE, {"scores": self.scores.astype(np.float32)})
        described = {
            "fingerprint": spec.fingerprint(),
            "coverage": dict(self.coverage),
            "recall": None,
            "queries": [{"key": key, "output": dict(out)} for key, out in zip(self.keys, self.outputs, strict=True)],
            "answers": self.answers,
        }
        write_description(into, described)
        size = bytes_of(into)
        queries, examples = self.scores.shape
        return FitSummary(spec.fingerprint(), examples, queries, size, None, dict(self.coverage), spec.num_training)


class ScoredIndex(ABC):
    """An index whose queries carry a score for every training example in `Query.rows`, (queries, n); it answers as a `LoadedIndex` does.

    Attributes:
        recall: None, as nothing is searched for.
        rescores: False, as scores are the method's own.
    """

    recall: ClassVar[float | None] = None
    rescores: ClassVar[bool] = False
    default_damping: ClassVar[float | None] = None
    folder: Path
    spec: FitSpec
    context: FitContext

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """n, the size of the training set."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """An estimate of what this index keeps in memory."""

    @abstractmethod
    def query(self, batch: Batch, damping: float | None) -> Query:
        """Score all training examples for queries."""

    @abstractmethod
    def outputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return what the model outputs for queries."""

    def attribute(self, query: Query, top_k: int, allowed: np.ndarray | None, *, rescore: bool) -> list[Attribution]:
        """Return the top_k allowed training examples of both signs for every query; see `LoadedIndex.attribute`."""
        rows = np.arange(self.num_examples) if allowed is None else np.flatnonzero(allowed)
        found = []
        for output, scores in zip(query.outputs, query.rows, strict=True):
            positive, negative = (top_rows(scores[rows], rows, top_k, sign) for sign in (1, -1))
            found.append(Attribution(output, positive, negative, approximate=False))
        return found

    def scores(self, query: Query, rows: np.ndarray, *, rescore: bool, progress: Progress | None = None) -> np.ndarray:
        """Return the scores of given training rows, (queries, rows) float32.

        Raises:
            InvalidInputError: naming a row that does not exist.
        """
        outside = rows[(rows < 0) | (rows >= self.num_examples)]
        if len(outside):
            raise InvalidInputError(
                f"row {outside[0]} does not exist: the index has {self.num_examples} training examples"
            )
        found: np.ndarray = query.rows[:, rows]
        return found

    def group_effects(self, query: Query, groups: Sequence[np.ndarray], *, rescore: bool) -> np.ndarray:
        """Return the summed scores of each group of rows, (queries, groups) float64: what having the group is worth.

        Raises:
            InvalidInputError: naming a row that does not exist.
        """
        effects = np.zeros((len(query), len(groups)))
        for number, rows in enumerate(groups):
            effects[:, number] = self.scores(query, rows, rescore=False).sum(1, dtype=np.float64)
        return effects

    def newton_effects(self, query: Query, groups: Sequence[np.ndarray]) -> np.ndarray:
        """Refuse: stored scores tell nothing of curvature.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(f"{self.spec.method.type} has no newton estimator: use additive", "/estimator")

    def spreads(self, query: Query, groups: Sequence[np.ndarray]) -> np.ndarray:
        """Return `Σ τ_i²` of each group, (queries, groups), by which prediction intervals grow."""
        found = [np.square(query.rows[:, rows], dtype=np.float64).sum(1) for rows in groups]
        return np.stack(found, axis=1)

    def deviations(self, query: Query, groups: Sequence[np.ndarray]) -> np.ndarray | None:
        """Return None: the method does not know how uncertain it is."""
        return None

    def self_influence(self) -> np.ndarray:
        """Refuse: training examples are no queries of this index.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(
            f"{self.spec.method.type} scores queries, and training examples would be as many: ask another index for self-influence"
        )


class DenseIndex(ScoredIndex):
    """Stored scores, ready to answer; the file is mapped, so only what is asked for is read.

    Args:
        folder: the artifact; its files are checked against the checksums it was written with.
        spec: what the artifact must have been fitted from.
        context: reused if the fit has one.
        device: where the data's tensors are put.

    Raises:
        FingerprintMismatchError: if the artifact was fitted from something else.
        CorruptArtifactError: if a file is missing, damaged or inconsistent.
    """

    def __init__(self, folder: Path, spec: FitSpec, context: FitContext | None = None, device: str = "cpu") -> None:
        described = read_description(folder)
        if described["fingerprint"] != spec.fingerprint():
            raise FingerprintMismatchError("the index was fitted to other weights, data or parameters; fit it again")
        self.folder, self.spec = folder, spec
        self.context = context or FitContext(spec, device)
        self.answers: str = described["answers"]
        self.coverage: dict[str, Any] = described["coverage"]
        self._outputs: list[dict[str, Any]] = [entry["output"] for entry in described["queries"]]
        self._places = {entry["key"]: place for place, entry in enumerate(described["queries"])}
        self._scores = mapped_arrays(folder / SCORES_FILE)["scores"]
        if self._scores.shape != (len(self._outputs), spec.dataset.num_examples):
            raise CorruptArtifactError(f"{SCORES_FILE} holds scores of shape {self._scores.shape}")

    @property
    def num_examples(self) -> int:
        """n, the size of the training set."""
        return int(self._scores.shape[1])

    @property
    def dim(self) -> int:
        """Numbers kept per training example: one per query."""
        return len(self._outputs)

    @property
    def bytes(self) -> int:
        """An estimate of what this index keeps in memory."""
        return int(self._scores.nbytes)

    def query(self, batch: Batch, damping: float | None) -> Query:
        """Recognise queries; there is nothing to damp.

        Raises:
            InvalidInputError: naming a query that the index has no scores of, and those it has.
        """
        places = self._recognised(batch)
        return Query([dict(self._outputs[place]) for place in places], [], self._scores[places], batch, damping)

    def outputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return what the model outputs for queries that it knows.

        Raises:
            InvalidInputError: naming a query that the index has no scores of, and those it has.
        """
        return [dict(self._outputs[place]) for place in self._recognised(batch)]

    def _recognised(self, batch: Batch) -> list[int]:
        places = [self._places.get(key) for key in query_keys(batch)]
        unknown = [number for number, place in enumerate(places) if place is None]
        if unknown:
            raise InvalidInputError(
                f"query {unknown[0]} is not one that this index has scores of: it answers {self.answers}", "/queries"
            )
        return [place for place in places if place is not None]


def query_keys(batch: Batch) -> list[str]:
    """Return a hash of each example's input, as the model takes it, and target: padding changes nothing."""
    keys = []
    for number in range(len(batch)):
        inputs = batch.inputs[number]
        if batch.mask is not None:
            inputs = inputs[batch.mask[number]]
        digest = hashlib.sha256(f"{inputs.dtype} {tuple(inputs.shape)}".encode())
        digest.update(inputs.contiguous().cpu().numpy().tobytes())
        if batch.targets is not None:
            digest.update(batch.targets[number].contiguous().cpu().numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys
