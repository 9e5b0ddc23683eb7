"""Fitting an index as deterministic shards and small reductions, so that any worker can do any shard and the bytes come out the same.

A fit is a list of stages. Each stage has shards that are pure functions of the spec and of earlier stages' reduced arrays, and one
reduction over its shards in order. `assemble` lays the results out as the artifact. There is no clock, random state or placement in any file.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.curvature import Eigenbasis
from attribution_core.curvature.fisher import FisherPasses
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.features.store import FeatureStore, write_shard
from attribution_core.fit_spec import FitSpec, FitSummary
from attribution_core.methods import trak
from attribution_core.methods.artifact import FACTORS_FILE, FEATURES_FOLDER, write_description
from attribution_core.methods.base import FeatureMethod, TrainRows
from attribution_core.methods.context import FitContext
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.recall import measured_recall
from attribution_core.progress import Progress
from attribution_core.search.faiss_index import FILE_NAME as SEARCH_FILE
from attribution_core.search.faiss_index import VectorIndex
from attribution_core.sharding import shard_ranges
from attribution_core.spec import EkfacMethod, RegressionTask, TrakMethod

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


class FitPipeline:
    """Runs the parts of one fit.

    Args:
        spec: what is fitted.
        work: folder where reduced arrays of finished stages are, as `<stage>.safetensors`; they are read once.
        device: where torch computes.
    """

    def __init__(self, spec: FitSpec, work: Path, device: str = "cpu") -> None:
        self.spec = spec
        self.work = work
        self.context = FitContext(spec, device)
        self._reductions: dict[str, Arrays] = {}
        self._methods: dict[int, FeatureMethod] = {}

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
            SingularCurvatureError: if the method's damping is 0 and the curvature singular.
            Cancelled: if the work should stop.
        """
        shard = self.stages()[0].shards[ordinal]
        rows = np.arange(shard.start, shard.stop)
        batches = self.context.source.batches(rows, self.context.batch_size(shard.checkpoint))
        match stage:
            case "covariance":
                return self._passes(shard.checkpoint).covariances(batches, progress).arrays()
            case "eigenvalues":
                blocks = self.context.checkpoint(shard.checkpoint).capture.blocks
                fitted = _of_checkpoint(self._reduced("covariance"), shard.checkpoint)
                basis = Eigenbasis(blocks, fitted, self.context.device)
                return self._passes(shard.checkpoint).eigenvalues(batches, basis, progress).arrays()
            case _:
                return self._features(shard.checkpoint, batches, progress)

    def reduce(self, stage: str, shard_files: Sequence[Path]) -> Arrays:
        """Combine a stage's shard files, given in order of their ordinals, into `<checkpoint>.<name>` arrays."""
        size = len(shard_files) // len(self.spec.checkpoints)
        reduced: Arrays = {}
        for number in range(len(self.spec.checkpoints)):
            files = shard_files[number * size : (number + 1) * size]
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
        write_arrays(into / FACTORS_FILE, self._curvature() | self._reduced("features"))
        self._write_features(into, feature_files)
        self._write_search(into)
        first = self.context.checkpoint(0).capture.coverage
        coverage = {"percent": first.percent, "covered": list(first.covered), "skipped": list(first.skipped)}
        described = {"fingerprint": self.spec.fingerprint(), "coverage": coverage}
        write_description(into, {**described, "recall": None})
        index = LoadedIndex(into, self.spec, self.context)
        recall = measured_recall(index, progress)
        write_description(into, {**described, "recall": recall})
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
        if stage not in self._reductions:
            self._reductions[stage] = read_arrays(self.work / f"{stage}.safetensors")
        return self._reductions[stage]

    def _curvature(self) -> Arrays:
        return self._reduced("covariance") | self._reduced("eigenvalues") if self._curved else {}

    def _features(self, number: int, batches: Iterable[Batch], progress: Progress) -> Arrays:
        if number not in self._methods:
            self._methods[number] = self.context.method(number, self._curvature())
        encoded: list[Arrays] = []
        for batch in batches:
            found = self._methods[number].encode_train(batch)
            _check_finite(found, batch)
            encoded.append(found.arrays())
            progress.advance(len(batch))
        return {name: np.concatenate([part[name] for part in encoded]) for name in encoded[0]}

    def _kernel(self, files: Sequence[Path]) -> Arrays:
        method = self.spec.method
        if not isinstance(method, TrakMethod):
            return {}
        # For squared errors the curvature of the loss in the prediction is 1.
        weighted = method.curvature == "gauss_newton" and not isinstance(self.spec.task, RegressionTask)
        return trak.kernel_of((read_arrays(path) for path in files), weighted=weighted)

    def _write_features(self, into: Path, files: Sequence[Path]) -> None:
        """Join each range's shards of all checkpoints side by side."""
        ranges = len(files) // len(self.spec.checkpoints)
        for number in range(ranges):
            shards = [read_arrays(path) for path in files[number::ranges]]
            rows = np.concatenate([shard["rows"] for shard in shards], axis=1)
            weights = np.mean([shard["weights"] for shard in shards], axis=0)
            if isinstance(self.spec.method, TrakMethod):
                own = self._trak_self_influence(shards, self.spec.method.damping) * weights
            else:
                own = np.mean([shard["self_influence"] for shard in shards], axis=0)
            write_shard(into / FEATURES_FOLDER, number, rows, weights, own, dtype=self.spec.store.dtype)

    def _trak_self_influence(self, shards: Sequence[Arrays], damping: float) -> np.ndarray:
        """Return `mean_m ⟨P∇m_i, (K + λ)⁻¹ φ_i⟩` of one range's rows, known only now that the kernel is."""
        total = np.zeros(len(shards[0]["rows"]))
        for number, shard in enumerate(shards):
            kernel = _of_checkpoint(self._reduced("features"), number)
            solved = trak.solve(kernel, shard.get("measured", shard["rows"]), damping)
            total += np.einsum("ik,ik->i", solved, shard["rows"], dtype=np.float64) / len(shards)
        return total

    def _write_search(self, into: Path) -> None:
        if self.spec.search.type == "flat":
            return  # an exhaustive search reads the rows themselves
        store = FeatureStore(into / FEATURES_FOLDER, self.spec.dataset.num_examples)
        dim = store.read(np.zeros(1, np.int64)).shape[1]
        VectorIndex.build(self.spec.search, store.weighted_blocks, len(store), dim).write(into / SEARCH_FILE)


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


def _check_finite(found: TrainRows, batch: Batch) -> None:
    finite = found.rows.isfinite().all(dim=1) & found.weights.isfinite()
    if not bool(finite.all()):
        row = int(batch.rows[~finite][0])
        raise InvalidInputError(f"the model gives no finite gradient for training example {row}")
