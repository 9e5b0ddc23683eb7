"""Fitting an index as deterministic shards and small reductions, so that any worker can do any shard and the bytes come out the same.

A fit is a list of stages. Each stage has shards that are pure functions of the spec and of earlier stages' reduced arrays, and one
reduction over its shards in order. `assemble` lays the results out as the artifact. There is no clock, random state or placement in any file.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.curvature import Eigenbasis
from attribution_core.curvature.fisher import FisherPasses
from attribution_core.errors import InvalidInputError
from attribution_core.features.store import FeatureStore, write_shard
from attribution_core.methods.context import FitContext, FitSpec
from attribution_core.methods.loaded import FACTORS_FILE, FEATURES_FOLDER, INDEX_FILE, LoadedIndex
from attribution_core.methods.recall import measured_recall
from attribution_core.progress import Progress
from attribution_core.search.faiss_index import FILE_NAME as SEARCH_FILE
from attribution_core.search.faiss_index import VectorIndex
from attribution_core.sharding import shard_ranges
from attribution_core.spec import ClassificationTask, EkfacMethod, TrakMethod

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """Rows `start … stop - 1` under one checkpoint."""

    ordinal: int
    checkpoint: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stage:
    """One pass over the training set."""

    name: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class FitSummary:
    """What a finished fit is.

    Attributes:
        dim: numbers per stored row, all checkpoints together.
        bytes: of the artifact.
        recall: of the first search stage against an exact scan, measured on training rows as queries.
        coverage: percentage of parameters attributed, layers covered and skipped.
    """

    fingerprint: str
    num_examples: int
    dim: int
    bytes: int
    recall: float
    coverage: dict[str, Any]


class FitPipeline:
    """Runs the parts of one fit.

    Args:
        spec: what is fitted.
        work: folder where reduced arrays of finished stages are, as `<stage>.safetensors`.
        device: where torch computes.
    """

    def __init__(self, spec: FitSpec, work: Path, device: str = "cpu") -> None:
        self.spec = spec
        self.work = work
        self.context = FitContext(spec, device)

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        ranges = shard_ranges(self.spec.dataset.num_examples, self.spec.shard_size)
        shards = tuple(
            Shard(checkpoint * len(ranges) + number, checkpoint, start, stop)
            for checkpoint in range(len(self.spec.checkpoints))
            for number, (start, stop) in enumerate(ranges)
        )
        names = ("covariance", "eigenvalues", "features") if self._curved else ("features",)
        return [Stage(name, shards) for name in names]

    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> Arrays:
        """Compute one shard of a stage; progress counts examples.

        Raises:
            InvalidInputError: if the data does not fit the model.
            Cancelled: if the work should stop.
        """
        shard = self.stages()[0].shards[ordinal]
        rows = np.arange(shard.start, shard.stop)
        batches = self.context.source.batches(rows, self.context.batch_size(shard.checkpoint))
        match stage:
            case "covariance":
                return self._passes(shard.checkpoint).covariances(batches, progress).arrays()
            case "eigenvalues":
                checkpoint = self.context.checkpoint(shard.checkpoint)
                fitted = _of_checkpoint(self._reduced("covariance"), shard.checkpoint)
                basis = Eigenbasis(checkpoint.capture.blocks, fitted, self.context.device)
                return self._passes(shard.checkpoint).eigenvalues(batches, basis, progress).arrays()
            case _:
                method = self.context.method(shard.checkpoint, self._curvature())
                encoded: list[Arrays] = []
                for batch in batches:
                    found = method.encode_train(batch)
                    own = found.weights if found.self_influence is None else found.self_influence
                    parts = {"rows": found.rows, "weights": found.weights, "self_influence": own}
                    encoded.append({name: value.detach().float().cpu().numpy() for name, value in parts.items()})
                    progress.advance(len(batch))
                return {name: np.concatenate([part[name] for part in encoded]) for name in encoded[0]}

    def reduce(self, stage: str, shard_files: Sequence[Path]) -> Arrays:
        """Combine a stage's shard files, given in order of their ordinals, into `<checkpoint>.<name>` arrays."""
        count = len(self.spec.checkpoints)
        per_checkpoint = np.array_split(np.array(shard_files, dtype=object), count)
        reduced: Arrays = {}
        for number, files in enumerate(per_checkpoint):
            if stage == "covariance":
                found = Eigenbasis.solve(_summed(files))
            elif stage == "eigenvalues":
                n = self.spec.dataset.num_examples
                found = {name: (value / n).astype(np.float32) for name, value in _summed(files).items()}
            else:
                found = self._kernel(files)
            reduced |= {f"{number}.{name}": value for name, value in found.items()}
        return reduced

    def assemble(self, into: Path, feature_files: Sequence[Path], progress: Progress) -> FitSummary:
        """Lay out the artifact in an empty folder from the reduced stages and the `features` shards in order."""
        fitted = self._curvature() | self._reduced("features")
        write_arrays(into / FACTORS_FILE, fitted or {"none": np.zeros(0, np.float32)})
        self._write_features(into, feature_files)
        self._write_search(into)
        first = self.context.checkpoint(0).capture.coverage
        coverage = {"percent": first.percent, "covered": list(first.covered), "skipped": list(first.skipped)}
        described = {"fingerprint": self.spec.fingerprint(), "coverage": coverage, "recall": 1.0}
        _write_json(into / INDEX_FILE, described)
        index = LoadedIndex(into, self.spec, self.context)
        recall = measured_recall(index, progress)
        _write_json(into / INDEX_FILE, {**described, "recall": recall})
        size = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
        return FitSummary(self.spec.fingerprint(), len(index.store), index.dim, size, recall, coverage)

    @property
    def _curved(self) -> bool:
        return isinstance(self.spec.method, EkfacMethod)

    def _passes(self, number: int) -> FisherPasses:
        checkpoint = self.context.checkpoint(number)
        assert isinstance(self.spec.method, EkfacMethod)
        return FisherPasses(checkpoint.module, checkpoint.capture, checkpoint.task, self.spec.method)

    def _reduced(self, stage: str) -> Arrays:
        return read_arrays(self.work / f"{stage}.safetensors")

    def _curvature(self) -> Arrays:
        return self._reduced("covariance") | self._reduced("eigenvalues") if self._curved else {}

    def _kernel(self, files: Sequence[Path]) -> Arrays:
        if not isinstance(self.spec.method, TrakMethod):
            return {"done": np.ones(1, np.float32)}
        shards = [read_arrays(path) for path in files]
        weighted = self.spec.method.curvature == "gauss_newton" and isinstance(self.spec.task, ClassificationTask)
        weights = [shard["weights"] for shard in shards] if weighted else []
        return dict(self.context.method(0, {}).kernel([shard["rows"] for shard in shards], weights))

    def _write_features(self, into: Path, files: Sequence[Path]) -> None:
        """Join each range's shards of all checkpoints side by side."""
        members = np.array(files, dtype=object).reshape(len(self.spec.checkpoints), -1)
        for number, of_range in enumerate(members.T):
            shards = [read_arrays(path) for path in of_range]
            rows = np.concatenate([shard["rows"] for shard in shards], axis=1).astype(self.spec.store.dtype)
            if not np.isfinite(rows).all():
                raise InvalidInputError("features are too large for float16; store them as float32", "/store/dtype")
            weights, own = (
                np.mean([shard[name] for shard in shards], axis=0) for name in ("weights", "self_influence")
            )
            if isinstance(self.spec.method, TrakMethod):
                own = self._trak_self_influence(shards, weights)
            write_shard(into / FEATURES_FOLDER, number, rows, weights, own)

    def _trak_self_influence(self, shards: Sequence[Arrays], weights: np.ndarray) -> np.ndarray:
        """Return `mean_m φᵀ(K + λ)⁻¹φ · w`, known only now that the kernel is."""
        fitted = self._reduced("features")
        total = np.zeros(len(weights), np.float32)
        for number, shard in enumerate(shards):
            vectors, values = (fitted[f"{number}.{name}"] for name in ("vectors", "values"))
            assert isinstance(self.spec.method, TrakMethod)
            rotated = shard["rows"] @ vectors
            total += (rotated**2 / (values + max(self.spec.method.damping, 1e-12) * values.mean())).sum(1) / len(shards)
        return total * weights

    def _write_search(self, into: Path) -> None:
        if self.spec.search.type == "flat":
            return  # an exhaustive search reads the rows themselves
        store = FeatureStore(into / FEATURES_FOLDER, self.spec.dataset.num_examples)
        index = VectorIndex.build(
            self.spec.search, weighted_blocks(store), len(store), store.read(np.zeros(1, int)).shape[1]
        )
        index.write(into / SEARCH_FILE)


def weighted_blocks(store: FeatureStore) -> list[tuple[int, np.ndarray]]:
    """Return rows multiplied by their weights, as they are searched."""
    return [(start, rows * store.weights[start : start + len(rows), None]) for start, rows in store.blocks()]


def fit(spec: FitSpec, work: Path, into: Path, progress: Progress, device: str = "cpu") -> FitSummary:
    """Run a whole fit in this process; the service runs the same parts as jobs."""
    pipeline = FitPipeline(spec, work, device)
    files: list[Path] = []
    for stage in pipeline.stages():
        files = [work / stage.name / f"{shard.ordinal:05d}.safetensors" for shard in stage.shards]
        for shard, path in zip(stage.shards, files, strict=True):
            write_arrays(path, pipeline.run_shard(stage.name, shard.ordinal, progress))
        write_arrays(work / f"{stage.name}.safetensors", pipeline.reduce(stage.name, files))
    into.mkdir(parents=True, exist_ok=True)
    summary = pipeline.assemble(into, files, progress)
    shutil.rmtree(work)
    return summary


def _of_checkpoint(arrays: Arrays, number: int) -> Arrays:
    return {name.split(".", 1)[1]: value for name, value in arrays.items() if name.startswith(f"{number}.")}


def _summed(files: Sequence[Path]) -> Arrays:
    total: Arrays = {}
    for path in files:
        for name, value in read_arrays(path).items():
            total[name] = total[name] + value if name in total else value
    return total


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True))
