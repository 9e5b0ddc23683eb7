"""A fitted index that answers: top examples of both signs, scores of given rows, effects of groups."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attribution_core.arrays import read_arrays
from attribution_core.data.batch import Batch
from attribution_core.errors import FingerprintMismatchError, InvalidInputError, NotFiniteError
from attribution_core.features.factors import GradientStore
from attribution_core.features.rows import rows_at_once
from attribution_core.features.store import FeatureStore
from attribution_core.fit_spec import FitSpec
from attribution_core.memory import release_freed
from attribution_core.method_spec import TrakMethod
from attribution_core.methods.answers import Attribution, Found, Query, top_rows
from attribution_core.methods.artifact import (
    FACTORS_FILE,
    FEATURES_FOLDER,
    GRADIENTS_FOLDER,
    SEARCH_FILE,
    read_description,
)
from attribution_core.methods.base import FeatureMethod, GradientMethod, QuerySide, summed
from attribution_core.methods.context import FitContext
from attribution_core.methods.fitted import weights_of_copies
from attribution_core.progress import NoProgress, Progress
from attribution_core.search.exact import BlockSearch
from attribution_core.spec import SearchSpec

if TYPE_CHECKING:
    from attribution_core.search.faiss_index import VectorIndex

# Candidates re-scored per wanted example and sign; below the floor more are taken, as projection noise is then large.
OVERSAMPLING = 8
MIN_CANDIDATES = 200
_ROWS_AT_ONCE = 4096
# Bytes of one member's query side after which freed memory is given back.
_LARGE_SIDE = 16 << 20


class LoadedIndex:
    """An index in memory, ready to answer. For one thread at a time.

    Args:
        folder: the artifact; its files are checked against the checksums it was written with.
        spec: what the artifact must have been fitted from.
        context: reused if the fit has one.
        device: where torch computes.
        holds_rows: whether a flat search may copy all rows into memory, which pays for many searches.

    Raises:
        FingerprintMismatchError: if the artifact was fitted from something else.
        CorruptArtifactError: if a file is missing, damaged or inconsistent.
    """

    def __init__(
        self,
        folder: Path,
        spec: FitSpec,
        context: FitContext | None = None,
        device: str = "cpu",
        *,
        holds_rows: bool = True,
    ) -> None:
        described = read_description(folder)
        if described["fingerprint"] != spec.fingerprint():
            raise FingerprintMismatchError("the index was fitted to other weights, data or parameters; fit it again")
        self.folder, self.spec, self._holds_rows = folder, spec, holds_rows
        self.recall: float | None = described["recall"]
        self._segments: list[tuple[int, int]] = described["segments"]
        self.context = context or FitContext(spec, device)
        self.store = FeatureStore(folder / FEATURES_FOLDER, spec.dataset.num_examples)
        fitted = read_arrays(folder / FACTORS_FILE)
        copies = weights_of_copies(fitted)
        self.context.copy_weights = lambda: copies
        self.gradients = self._gradient_store(device)
        # None for methods without.
        self.default_damping = self.context.defaults.damping(fitted)
        self.members: list[FeatureMethod] = [self.context.method(n, fitted) for n in range(len(spec.members))]

    @property
    def num_examples(self) -> int:
        """n, the size of the training set."""
        return len(self.store)

    @property
    def dim(self) -> int:
        """Numbers kept per training example, all checkpoints together."""
        return sum(member.dim for member in self.members) if self.gradients is None else self.gradients.numbers

    @property
    def bytes(self) -> int:
        """An estimate of what this index keeps in memory, which grows with the first query where a method solves on training gradients."""
        return self._loaded_bytes + self.context.pseudo_gradients.held_bytes

    @cached_property
    def _loaded_bytes(self) -> int:
        parameters = sum(p.numel() for member in self.members for p in member.checkpoint.module.parameters())
        factors = (self.folder / FACTORS_FILE).stat().st_size
        if any(isinstance(member, GradientMethod) and member.whitened_at is not None for member in self.members):
            factors *= 3  # the whitening's sides and their inverses are as large as the eigenvectors
        if self.gradients is not None:
            return 4 * parameters + factors + self.gradients.bytes
        path = self.folder / SEARCH_FILE
        held = len(self.store) * (4 * self.dim if self.store.sizes is None else self.dim // 8 + 8)
        searched = path.stat().st_size if path.exists() else held
        return 4 * (parameters + 2 * len(self.store)) + searched + factors

    @property
    def rescores(self) -> bool:
        """Whether exact scores differ from inner products of stored rows, and take the model and the data."""
        return self.gradients is None and not self.spec.method.exact_rows

    def query(self, batch: Batch, damping: float | None) -> Query:
        """Encode queries; a damping of None is the method's default.

        Raises:
            SingularCurvatureError: if the curvature is singular at this damping.
            InvalidInputError: if the queries do not fit the model, have no target, or overflow.
        """
        used = self.default_damping if damping is None else damping
        sides = []
        for member in self.members:
            sides.append(member.precondition(member.encode_query(batch), used or 0.0))
            if len(self.members) > 1 and sides[-1].nbytes > _LARGE_SIDE:
                release_freed()  # else what one member's passes leave in pieces adds up over the ensemble
        return self.joined(sides, batch, used)

    def joined(self, sides: Sequence[QuerySide], batch: Batch, damping: float | None) -> Query:
        """Return queries whose sides, one per checkpoint, were preconditioned with a damping.

        Raises:
            NotFiniteError: if a gradient is not finite.
        """
        usable = torch.stack([side.finite for side in sides]).all(0)
        if not usable.all():
            raise NotFiniteError(f"the model gives no finite gradient for query {int(usable.int().argmin())}")
        rows = torch.cat([side.rows for side in sides], dim=1) / len(sides)
        outputs = self._described([sides[number].output for number in self.spec.answering()], batch)
        return Query(outputs, list(sides), rows.detach().float().cpu().numpy(), batch, damping)

    def outputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return what the model outputs for a batch, without any attribution."""
        answering = [self.context.checkpoint(number) for number in self.spec.answering()]
        return self._described([checkpoint.output(batch) for checkpoint in answering], batch)

    def attribute(self, query: Query, top_k: int, allowed: np.ndarray | None, *, rescore: bool) -> list[Attribution]:
        """Return the top_k allowed training examples of both signs for every query.

        Only scores above 0 are positive and below 0 negative, so lists may be shorter than top_k. Equal scores are ordered by row.

        Args:
            query: encoded queries.
            top_k: examples per sign.
            allowed: (n,) bool, all training examples by default; those left out of training never are.
            rescore: replace the candidates' scores by exact ones, where they differ.
        """
        allowed = self._trained_on(allowed)
        if self.gradients is not None:
            return self._scanned(query, top_k, allowed)
        if rescore and self.rescores:
            return self._rescored(query, top_k, allowed)
        approximate = self.rescores or not self._search.exhaustive or self.context.lossy
        ranked = {sign: self._search.search(sign * query.rows, top_k, allowed) for sign in (1, -1)}
        results = []
        for number, output in enumerate(query.outputs):
            found = {}
            for sign, lists in ranked.items():
                rows, scores = lists.rows[number], sign * lists.scores[number]
                found[sign] = top_rows(self._thresholded(scores[rows >= 0]), rows[rows >= 0], top_k, sign)
            results.append(Attribution(output, found[1], found[-1], approximate))
        return results

    def candidates(self, query: Query, top_k: int, allowed: np.ndarray | None) -> list[np.ndarray]:
        """Return the rows that the first stage finds for both signs together, ascending, per query."""
        if self.gradients is not None:
            return [np.union1d(best.positive.rows, best.negative.rows) for best in self._scanned(query, top_k, allowed)]
        wanted = max(OVERSAMPLING * top_k, MIN_CANDIDATES) if self.rescores else top_k
        both = [self._search.search(sign * query.rows, wanted, allowed).rows for sign in (1, -1)]
        found = [np.unique(rows) for rows in np.concatenate(both, axis=1)]
        return [rows[rows >= 0] for rows in found]

    def scores(self, query: Query, rows: np.ndarray, *, rescore: bool, progress: Progress | None = None) -> np.ndarray:
        """Return the scores of given training rows, (queries, rows) float32; gradients are held for one batch at a time.

        Raises:
            InvalidInputError: naming a row that does not exist.
        """
        self._check_rows(rows)
        if self.gradients is not None:
            return self._kept_scores(query, rows)
        if rescore and self.rescores:
            return self._exact_scores(query, rows, progress or NoProgress())
        scores = np.empty((len(query), len(rows)), np.float32)
        step = rows_at_once(self.dim)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            scores[:, start : start + len(part)] = query.rows @ self.store.read(part).T * self.store.weights[part]
        return self._thresholded(scores)

    def group_effects(self, query: Query, groups: Sequence[np.ndarray], *, rescore: bool) -> np.ndarray:
        """Return the summed scores of each group of rows, (queries, groups) float64: what having the group is worth.

        A group's exact effect costs one backward pass over it where scores are linear in the training gradient.

        Raises:
            InvalidInputError: naming a row that does not exist.
        """
        effects = np.zeros((len(query), len(groups)))
        for number, rows in enumerate(groups):
            self._check_rows(rows)
            if self.gradients is not None:
                effects[:, number] = self._kept_effect(query, rows)
            elif rescore and self.rescores and self.members[0].linear:
                effects[:, number] = self._summed_effect(query, rows)
            else:
                for start in range(0, len(rows), _ROWS_AT_ONCE):
                    part = self.scores(query, rows[start : start + _ROWS_AT_ONCE], rescore=rescore)
                    effects[:, number] += part.sum(1, dtype=np.float64)
        return effects

    def newton_effects(self, query: Query, groups: Sequence[np.ndarray]) -> np.ndarray:
        """Return what having each group is worth beyond the sum of its scores, (queries, groups) float64.

        A group's examples share in the curvature that the additive effect divides by; here it is that of the others:
        `∇mᵀ (H - H_F)⁻¹ Σ_F φ`. It tends to the additive effect for small groups, and is the refit's for squared errors.

        Raises:
            InvalidInputError: naming a row that does not exist, or if the method has no such estimator.
            SingularCurvatureError: if what is left cannot be inverted.
        """
        effects = np.zeros((len(query), len(groups)))
        for place, rows in enumerate(groups):
            self._check_rows(rows)
            if len(rows) == 0:
                continue
            weights = np.mean([self._train_weights(number, rows) for number in range(len(self.members))], axis=0)
            for number, member in enumerate(self.members):
                group = self.context.pseudo_gradients.group(number, rows, weights)
                found = member.newton_effect(query.batch, group, query.damping or 0.0)
                effects[:, place] += found.detach().double().cpu().numpy() / len(self.members)
        return effects

    def spreads(self, query: Query, groups: Sequence[np.ndarray], *, rescore: bool = True) -> np.ndarray:
        """Return `Σ τ_i²` of each group, (queries, groups), by which prediction intervals grow."""
        spreads = np.zeros((len(query), len(groups)))
        for number, rows in enumerate(groups):
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = self.scores(query, rows[start : start + _ROWS_AT_ONCE], rescore=rescore)
                spreads[:, number] += np.square(part, dtype=np.float64).sum(1)
        return spreads

    def deviations(self, query: Query, groups: Sequence[np.ndarray]) -> np.ndarray | None:
        """Return None: the method does not know how uncertain it is."""
        return None

    def self_influence(self) -> np.ndarray:
        """Return `τ_i(z_i)` at the default damping, (n,) float32.

        Raises:
            InvalidInputError: if the method has none.
        """
        if not self.spec.method.self_influence:
            raise InvalidInputError(
                f"self-influence by {self.spec.method.type} takes a pass over the training set for every example: ask another index"
            )
        return self._self_influence

    @cached_property
    def _self_influence(self) -> np.ndarray:
        """Stored values are shares of the training set there was when they were computed."""
        found, start = self.store.self_influence.copy(), 0
        for stop, n in self._segments if self.members[0].shared else []:
            found[start:stop] *= n / self.spec.num_training
            start = stop
        return found

    def _trained_on(self, allowed: np.ndarray | None) -> np.ndarray | None:
        if not self.spec.left_out:
            return allowed
        mask = np.zeros(len(self.store), dtype=bool)
        mask[self.context.training_rows] = True
        return mask if allowed is None else mask & allowed

    @cached_property
    def _search(self) -> "VectorIndex | BlockSearch":
        searched = (self.folder / SEARCH_FILE).exists()
        # Bits are few enough to be held, and what answers queries is what recall is measured of.
        if not searched and not self._holds_rows and self.store.sizes is None:
            return BlockSearch(self.store)
        from attribution_core.search.faiss_index import VectorIndex  # noqa: PLC0415, megabytes that few indexes need

        if searched:
            return VectorIndex.read(self.folder / SEARCH_FILE, self.store)
        return VectorIndex.build(SearchSpec(), self.store)

    def _gradient_store(self, device: str) -> GradientStore | None:
        folder = self.folder / GRADIENTS_FOLDER
        if not folder.exists():
            return None
        blocks = self.context.checkpoint(0).capture.blocks
        return GradientStore(folder, self.store.starts, blocks, device)

    def _scanned(self, query: Query, top_k: int, allowed: np.ndarray | None) -> list[Attribution]:
        """Rank every allowed example by its whole gradient, which is kept, so that nothing needs the model."""
        found = [[Found.nothing(), Found.nothing()] for _ in range(len(query))]
        rows = np.arange(len(self.store)) if allowed is None else np.flatnonzero(allowed)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            scores = self._kept_scores(query, part)
            for number, best in enumerate(found):
                for place, sign in enumerate((1, -1)):
                    best[place] = best[place].merged(top_rows(scores[number], part, top_k, sign), top_k, sign)
        return [
            Attribution(output, positive, negative, self.context.lossy)
            for output, (positive, negative) in zip(query.outputs, found, strict=True)
        ]

    def _kept_scores(self, query: Query, rows: np.ndarray) -> np.ndarray:
        """Return scores (queries, rows) from gradients kept as factors."""
        assert self.gradients is not None
        scores = np.zeros((len(query), len(rows)), np.float32)
        for number, side in enumerate(query.sides):
            member = self._compared(number)
            for places, gradients in self.gradients.read(number, rows, member.rotations):
                part = member.scores_of(side, gradients)
                scores[:, places] += part.cpu().numpy() / len(self.members)
        return scores

    def _compared(self, number: int) -> GradientMethod:
        member = self.members[number]
        assert isinstance(member, GradientMethod)
        return member

    def _kept_effect(self, query: Query, rows: np.ndarray) -> np.ndarray:
        assert self.gradients is not None
        effect = np.zeros(len(query))
        for number, side in enumerate(query.sides):
            for _, gradients in self.gradients.read(number, rows, self._compared(number).rotations):
                effect += summed(side, gradients).double().cpu().numpy() / len(self.members)
        return effect

    def _rescored(self, query: Query, top_k: int, allowed: np.ndarray | None) -> list[Attribution]:
        candidates = self.candidates(query, top_k, allowed)
        union = np.unique(np.concatenate(candidates)) if candidates else np.empty(0, np.int64)
        exact = self._exact_scores(query, union, NoProgress())
        count = len(self.store) if allowed is None else int(allowed.sum())
        results = []
        for number, rows in enumerate(candidates):
            # A query sees its own candidates only, so its answer does not depend on what was asked beside it.
            scores = exact[number][np.searchsorted(union, rows)]
            positive, negative = (top_rows(scores, rows, top_k, sign) for sign in (1, -1))
            results.append(Attribution(query.outputs[number], positive, negative, len(rows) < count))
        return results

    def _exact_scores(self, query: Query, rows: np.ndarray, progress: Progress) -> np.ndarray:
        total = np.zeros((len(query), len(rows)), np.float32)
        for number, (member, side) in enumerate(zip(self.members, query.sides, strict=True)):
            done = 0
            for batch in self.context.source.batches(rows, self.context.batch_size(number)):
                part = member.exact_scores(side, batch).detach().float().cpu().numpy()
                total[:, done : done + len(batch)] += part / len(self.members)
                done += len(batch)
                progress.advance(0)
        return total

    def _summed_effect(self, query: Query, rows: np.ndarray) -> np.ndarray:
        effect = np.zeros(len(query))
        for number, (member, side) in enumerate(zip(self.members, query.sides, strict=True)):
            for batch in self.context.source.batches(rows, self.context.batch_size(number)):
                effect += member.group_effect(side, batch).detach().double().cpu().numpy() / len(self.members)
        return effect

    def _train_weights(self, number: int, rows: np.ndarray) -> np.ndarray:
        parts = [self.members[number].train_weights(batch) for batch in self.context.batches(number, rows)]
        weights: np.ndarray = torch.cat(parts).double().cpu().numpy()
        return weights

    def _check_rows(self, rows: np.ndarray) -> None:
        outside = rows[(rows < 0) | (rows >= len(self.store))]
        if len(outside):
            raise InvalidInputError(
                f"row {outside[0]} does not exist: the index has {len(self.store)} training examples"
            )

    def _thresholded(self, scores: np.ndarray) -> np.ndarray:
        """Apply TRAK's soft threshold, where asked for."""
        threshold = self.spec.method.soft_threshold if isinstance(self.spec.method, TrakMethod) else None
        if threshold is None:
            return scores
        shrunk: np.ndarray = np.sign(scores) * np.maximum(np.abs(scores) - threshold, 0)
        return shrunk

    def _described(self, outputs: Sequence[torch.Tensor], batch: Batch) -> list[dict[str, Any]]:
        task, measurement = self.context.task, self.spec.measurement
        described = task.describe(torch.stack(list(outputs)).mean(0), batch, measurement)
        values = torch.stack([task.measure(output, batch, measurement) for output in outputs]).mean(0).tolist()
        return [{**entry, "value": value} for entry, value in zip(described, values, strict=True)]
