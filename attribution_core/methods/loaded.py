"""A fitted index that answers: top examples of both signs, scores of given rows, effects of groups."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribution_core.arrays import read_arrays
from attribution_core.data.batch import Batch
from attribution_core.errors import CorruptArtifactError, FingerprintMismatchError
from attribution_core.features.store import FeatureStore
from attribution_core.methods.base import FeatureMethod, QuerySide
from attribution_core.methods.context import FitContext, FitSpec
from attribution_core.progress import NoProgress, Progress
from attribution_core.search.faiss_index import FILE_NAME as SEARCH_FILE
from attribution_core.search.faiss_index import VectorIndex
from attribution_core.spec import TrakMethod

FACTORS_FILE = "factors.safetensors"
FEATURES_FOLDER = "features"
INDEX_FILE = "index.json"
# Candidates re-scored per wanted example and sign; below the floor more are taken, as projection noise is then large.
OVERSAMPLING = 8
MIN_CANDIDATES = 200


@dataclass(frozen=True)
class Query:
    """Encoded queries: one side per checkpoint, and what the model outputs for them.

    Attributes:
        outputs: `{"value", "prediction", "probability"}` per query; the value is the mean over checkpoints.
        rows: (queries, dim) float32, what stored weighted rows are multiplied with.
    """

    outputs: list[dict[str, Any]]
    sides: list[QuerySide]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.outputs)


@dataclass(frozen=True)
class Found:
    """The best rows of one sign for one query: row numbers and scores, best first."""

    rows: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Attribution:
    """Top examples of both signs for one query."""

    output: dict[str, Any]
    positive: Found
    negative: Found


class LoadedIndex:
    """An index in memory, ready to answer.

    Args:
        folder: the artifact, already verified against its manifest.
        spec: what the artifact must have been fitted from.
        context: reused if the fit has one.

    Raises:
        FingerprintMismatchError: if the artifact was fitted from something else.
        CorruptArtifactError: if a file is missing or inconsistent.
    """

    def __init__(self, folder: Path, spec: FitSpec, context: FitContext | None = None, device: str = "cpu") -> None:
        try:
            described = json.loads((folder / INDEX_FILE).read_text())
        except (OSError, ValueError) as error:
            raise CorruptArtifactError(f"{INDEX_FILE} cannot be read: {error}") from error
        if described["fingerprint"] != spec.fingerprint():
            raise FingerprintMismatchError("the index was fitted to other weights, data or parameters; fit it again")
        self.folder, self.spec = folder, spec
        self.recall: float = described["recall"]
        self.context = context or FitContext(spec, device)
        self.store = FeatureStore(folder / FEATURES_FOLDER, spec.dataset.num_examples)
        fitted = read_arrays(folder / FACTORS_FILE)
        self.members: list[FeatureMethod] = [self.context.method(n, fitted) for n in range(len(spec.checkpoints))]

    @property
    def dim(self) -> int:
        """Numbers per stored row."""
        return sum(member.dim for member in self.members)

    @property
    def bytes(self) -> int:
        """An estimate of what this index keeps in memory."""
        parameters = sum(
            p.numel() for n in range(len(self.members)) for p in self.context.checkpoint(n).module.parameters()
        )
        factors = (self.folder / FACTORS_FILE).stat().st_size
        return 4 * (parameters + len(self.store) * (self.dim + 2)) + factors

    @property
    def rescores(self) -> bool:
        """Whether exact scores differ from inner products of stored rows."""
        return not self.members[0].exact_rows

    def query(self, batch: Batch, damping: float | None) -> Query:
        """Encode queries and precondition them; a damping of None is the method's default.

        Raises:
            SingularCurvatureError: if the curvature is singular at this damping.
            InvalidInputError: if the queries do not fit the model or have no target.
        """
        used = self.default_damping if damping is None else damping
        sides = []
        for member in self.members:
            with torch.no_grad():
                self.context.task.check(batch.forward(member.checkpoint.module), batch)
            sides.append(member.precondition(member.encode_query(batch), used or 0.0))
        rows = torch.cat([side.rows for side in sides], dim=1) / len(sides)
        return Query(self._outputs(sides, batch), sides, rows.detach().float().cpu().numpy())

    @property
    def default_damping(self) -> float | None:
        """The method's damping where a query names none; None for methods without."""
        return getattr(self.spec.method, "damping", None)

    def attribute(self, query: Query, top_k: int, allowed: np.ndarray | None, *, rescore: bool) -> list[Attribution]:
        """Return the top_k allowed training examples of both signs for every query.

        Only scores above 0 are positive and below 0 negative, so lists may be shorter than top_k. Equal scores are ordered by row.
        """
        found = {sign: self._best(query, sign, top_k, allowed, rescore) for sign in (1, -1)}
        return [Attribution(output, found[1][number], found[-1][number]) for number, output in enumerate(query.outputs)]

    def candidates(self, query: Query, sign: int, top_k: int, allowed: np.ndarray | None) -> list[np.ndarray]:
        """Return the rows the first stage would have re-scored, per query."""
        wanted = max(OVERSAMPLING * top_k, MIN_CANDIDATES) if self.rescores else top_k
        ranked = self._search.search(sign * query.rows, wanted, allowed)
        return [rows[rows >= 0] for rows in ranked.rows]

    def scores(self, query: Query, rows: np.ndarray, *, rescore: bool) -> np.ndarray:
        """Return the scores of given training rows, (queries, rows) float32."""
        if rescore and self.rescores:
            return self.exact_scores(query, rows, NoProgress())
        return self._thresholded(query.rows @ self.store.read(rows).T * self.store.weights[rows])

    def exact_scores(self, query: Query, rows: np.ndarray, progress: Progress) -> np.ndarray:
        """Return unprojected scores of given rows, (queries, rows), in memory bounded by a batch of gradients."""
        if not self.rescores:
            return self.scores(query, rows, rescore=False)
        total = np.zeros((len(query), len(rows)), np.float32)
        for number, (member, side) in enumerate(zip(self.members, query.sides, strict=True)):
            size = self.context.batch_size(number)
            for start, batch in enumerate(self.context.source.batches(rows, size)):
                part = member.exact_scores(side, batch).detach().float().cpu().numpy()
                total[:, start * size : start * size + len(batch)] += part / len(self.members)
                progress.advance(0)
        return total

    def group_effects(self, query: Query, groups: Sequence[np.ndarray], *, rescore: bool) -> np.ndarray:
        """Return the summed scores of each group of rows, (queries, groups) float64: what having the group is worth.

        A group's exact effect costs one backward pass over it where scores are linear in the training gradient.
        """
        effects = np.zeros((len(query), len(groups)))
        for number, rows in enumerate(groups):
            if rescore and self.rescores and self.members[0].linear:
                effects[:, number] = self._summed_effect(query, rows)
            else:
                for part in np.array_split(rows, -(-len(rows) // 4096)) if len(rows) else []:
                    effects[:, number] += self.scores(query, part, rescore=rescore).sum(1, dtype=np.float64)
        return effects

    def self_influence(self) -> np.ndarray:
        """Return `τ_i(z_i)` at the default damping, (n,) float32."""
        return self.store.self_influence

    def outputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return what the model outputs for a batch, without any attribution."""
        outputs = []
        for member in self.members:
            with torch.no_grad():
                output = batch.forward(member.checkpoint.module)
                self.context.task.check(output, batch)
                outputs.append(QuerySide(output, output))
        return self._outputs(outputs, batch)

    @cached_property
    def _search(self) -> VectorIndex:
        if (self.folder / SEARCH_FILE).exists():
            return VectorIndex.read(self.folder / SEARCH_FILE)
        blocks = (
            (start, rows * self.store.weights[start : start + len(rows), None]) for start, rows in self.store.blocks()
        )
        return VectorIndex.build(self.spec.search, blocks, len(self.store), self.dim)

    def _best(self, query: Query, sign: int, top_k: int, allowed: np.ndarray | None, rescore: bool) -> list[Found]:
        if not (rescore and self.rescores):
            ranked = self._search.search(sign * query.rows, top_k, allowed)
            return [
                _ordered(rows[rows >= 0], self._thresholded(sign * scores[rows >= 0]), top_k, sign)
                for rows, scores in zip(ranked.rows, ranked.scores, strict=True)
            ]
        candidates = self.candidates(query, sign, top_k, allowed)
        union = np.unique(np.concatenate(candidates)) if candidates else np.empty(0, np.int64)
        if not len(union):
            return [Found(union, np.empty(0, np.float32)) for _ in candidates]
        exact = self.exact_scores(query, union, NoProgress())
        return [
            _ordered(rows, exact[number][np.searchsorted(union, rows)], top_k, sign)
            for number, rows in enumerate(candidates)
        ]

    def _summed_effect(self, query: Query, rows: np.ndarray) -> np.ndarray:
        effect = np.zeros(len(query))
        for number, (member, side) in enumerate(zip(self.members, query.sides, strict=True)):
            for batch in self.context.source.batches(rows, self.context.batch_size(number)):
                effect += member.group_effect(side, batch).detach().double().cpu().numpy() / len(self.members)
        return effect

    def _thresholded(self, scores: np.ndarray) -> np.ndarray:
        """Apply TRAK's soft threshold, where asked for."""
        threshold = self.spec.method.soft_threshold if isinstance(self.spec.method, TrakMethod) else None
        return scores if threshold is None else np.sign(scores) * np.maximum(np.abs(scores) - threshold, 0)

    def _outputs(self, sides: Sequence[QuerySide], batch: Batch) -> list[dict[str, Any]]:
        task, measurement = self.context.task, self.spec.measurement
        described = task.describe(torch.stack([side.output for side in sides]).mean(0), batch, measurement)
        values = torch.stack([task.measure(side.output, batch, measurement) for side in sides]).mean(0).tolist()
        return [{**entry, "value": value} for entry, value in zip(described, values, strict=True)]


def top_rows(scores: np.ndarray, rows: np.ndarray, k: int, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k rows whose scores are furthest on one side of 0, and their scores."""
    found = _ordered(rows, scores, k, sign)
    return found.rows, found.scores


def _ordered(rows: np.ndarray, scores: np.ndarray, k: int, sign: int) -> Found:
    keep = sign * scores > 0
    rows, scores = rows[keep], scores[keep]
    order = np.lexsort((rows, -sign * scores))[:k]
    return Found(rows[order], scores[order])
