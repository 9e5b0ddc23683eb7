"""Fitting an index as deterministic shards and small reductions, so that any worker can do any shard and the bytes come out the same.

A fit is a list of stages. Each stage has shards that are pure functions of the spec and of earlier stages' reduced arrays, and one
reduction over its shards in order. `assemble` lays the results out as the artifact. There is no clock, random state or placement in any file.
"""

import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.curvature import CovarianceSums, Eigenbasis, EigenvalueSums, Identity
from attribution_core.curvature.dense import spectrum, summed_hessian
from attribution_core.curvature.ekfac import Draws, kronecker_eigenvalues
from attribution_core.curvature.fisher import Fisher, Observed, compact
from attribution_core.curvature.iterative import product_over
from attribution_core.curvature.solvers import arnoldi, mean_eigenvalue
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.features.factors import encoded, write_gradients
from attribution_core.features.store import FeatureStore, write_shard
from attribution_core.fit_spec import FitSpec, FitSummary
from attribution_core.gradients import Block
from attribution_core.memory import release_freed
from attribution_core.method_spec import (
    ArnoldiMethod,
    HessianMethod,
    KfacMethod,
    LograMethod,
    TrakMethod,
)
from attribution_core.methods import trak
from attribution_core.methods.artifact import (
    FACTORS_FILE,
    FEATURES_FOLDER,
    GRADIENTS_FOLDER,
    SEARCH_FILE,
    write_description,
)
from attribution_core.methods.bank import BankPipeline
from attribution_core.methods.base import FeatureMethod, GradientMethod, QuerySide, TrainRows
from attribution_core.methods.context import FitContext, of_checkpoint
from attribution_core.methods.loaded import LoadedIndex, Query
from attribution_core.methods.logra import Logra, fisher_of
from attribution_core.methods.magic import MagicPipeline
from attribution_core.methods.opening import opened_priors
from attribution_core.methods.recall import measured_recall, recall_rows
from attribution_core.methods.trak import Trak
from attribution_core.progress import Progress
from attribution_core.sharding import Stage, shard_ranges
from attribution_core.spec import RegressionTask

Arrays = dict[str, np.ndarray]
# Rows up to which stored self-influence was divided by which n.
Segment = tuple[int, int]
# Gradients that one pass keeps in memory for the next.
KEPT_BYTES = 128 << 20
_MATRIX_SHARDS = 8
_GRADIENT = "gradient."
_EXACT = "exact"


@dataclass(frozen=True)
class Shard:
    """Training examples number `start … stop - 1` under one checkpoint, every `step`-th of them; examples left out have no number."""

    ordinal: int
    checkpoint: int
    start: int
    stop: int
    step: int = 1

    @property
    def units(self) -> int:
        """Training examples in it."""
        return len(range(self.start, self.stop, self.step))


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
        # What is computed: all rows that are trained on, or those that no earlier fit covers.
        self.rows = self.context.training_rows[self.context.training_rows >= spec.num_covered]
        self._reductions: dict[str, Arrays] = {}
        self._methods: dict[int, FeatureMethod] = {}
        # The first batches of each shard, as the first pass over it left them for the next.
        self._kept: dict[int, list[Observed]] = {}
        self._kept_bytes = 0
        self._recall_sides: dict[GradientMethod, QuerySide] = {}

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        return [Stage(name, self._shards(name)) for name in self.spec.method.stages]

    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> Arrays:
        """Compute one shard of a stage; progress counts examples.

        Raises:
            InvalidInputError: if the data does not fit the model.
            SingularCurvatureError: if the method's damping is 0 and the curvature singular.
            Cancelled: if the work should stop.
        """
        shard = self._shards(stage)[ordinal]
        match stage:
            case "covariance":
                counts = isinstance(self.spec.method, KfacMethod)
                covariances = CovarianceSums(self._blocks(shard), count_positions=counts)
                for draws in self._draws(stage, shard, progress):
                    covariances.add(draws)
                return covariances.arrays()
            case "eigenvalues":
                eigenvalues = EigenvalueSums(self._basis(shard.checkpoint))
                for draws in self._draws(stage, shard, progress):
                    eigenvalues.add(draws)
                return eigenvalues.arrays()
            case "hessian":
                products, batches = self.context.products(shard.checkpoint), self._counted(shard, progress)
                return {"hessian": summed_hessian(products, batches, self._blocks(shard))}
            case "krylov":
                return self._krylov(shard, progress)
            case "kernel":
                return self._kernel_sum(shard, progress)
            case _:
                return self._features(shard, progress)

    def reduce(self, stage: str, shard_files: Sequence[Path]) -> Arrays:
        """Combine a stage's shard files, given in order of their ordinals, into `<checkpoint>.<name>` arrays.

        Checkpoints that share a curvature have it under the first one's number.
        """
        size = len(shard_files) // len(self.spec.checkpoints)
        reduced: Arrays = {}
        for group in self.spec.curvature_groups():
            files = [path for number in group for path in shard_files[number * size : (number + 1) * size]]
            found = self._reduction(stage, group, files)
            reduced |= {f"{group[0]}.{name}": value for name, value in found.items()}
        return reduced

    def _reduction(self, stage: str, group: tuple[int, ...], files: Sequence[Path]) -> Arrays:
        n, number, method = self.spec.num_training * len(group), group[0], self.spec.method
        match stage:
            case "covariance":
                solved = Eigenbasis.solve(summed_arrays(files))
                if isinstance(method, KfacMethod):
                    blocks = self.context.checkpoint(number).capture.blocks
                    solved |= kronecker_eigenvalues(blocks, solved, n)
                return {name: value for name, value in solved.items() if not name.startswith("spectrum.")}
            case "eigenvalues":
                return {name: (value / n).astype(np.float32) for name, value in summed_arrays(files).items()}
            case "hessian":
                assert isinstance(method, HessianMethod)
                mean = summed_arrays(files)["hessian"] / n
                return spectrum(mean + method.l2 * np.eye(len(mean)))
            case "krylov":
                return read_arrays(files[0])
            case "kernel":
                return trak.eigen(summed_arrays(files)["kernel"])
            case _:
                return self._feature_kernel(number, files)

    def assemble(self, into: Path, feature_files: Sequence[Path], progress: Progress) -> FitSummary:
        """Lay out the artifact in an empty folder from the reduced stages and the `features` shards in order."""
        write_arrays(into / FACTORS_FILE, self._fitted(self.spec.method.stages))
        self._write_features(into, feature_files)
        self._write_search(into)
        self._describe(into, recall=None)
        index = LoadedIndex(into, self.spec, self.context)
        recall = measured_recall(index, lambda: self._exact_scores(index, feature_files))
        self._describe(into, recall=recall)
        return self._summary(into, index, recall)

    def _describe(self, into: Path, *, recall: float | None, before: Sequence[Segment] = ()) -> None:
        segments = [*before, (self.spec.dataset.num_examples, self.spec.num_training)]
        described = {"fingerprint": self.spec.fingerprint(), "coverage": self._coverage(), "segments": segments}
        write_description(into, {**described, "recall": recall})

    def _coverage(self) -> dict[str, Any]:
        first = self.context.checkpoint(0).capture.coverage
        return {"percent": first.percent, "covered": list(first.covered), "skipped": list(first.skipped)}

    def _summary(self, into: Path, index: LoadedIndex, recall: float) -> FitSummary:
        size = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
        n = self.spec.num_training
        return FitSummary(self.spec.fingerprint(), len(index.store), index.dim, size, recall, self._coverage(), n)

    def _shards(self, stage: str) -> tuple[Shard, ...]:
        """Return a stage's shards; those whose result is a large matrix are few."""
        n, size = len(self.rows), self.spec.shard_size
        if stage in ("hessian", "kernel"):
            size = max(size, -(-n // _MATRIX_SHARDS))
        ranges = shard_ranges(n, n if stage == "krylov" else size)
        return tuple(
            Shard(checkpoint * len(ranges) + number, checkpoint, start, stop)
            for checkpoint in range(len(self.spec.checkpoints))
            for number, (start, stop) in enumerate(ranges)
        )

    def _blocks(self, shard: Shard) -> list[Block]:
        return self.context.checkpoint(shard.checkpoint).capture.blocks

    def _basis(self, number: int) -> Eigenbasis:
        before = [stage for stage in self.spec.method.stages if stage == "covariance"]
        (first,) = (group[0] for group in self.spec.curvature_groups() if number in group)
        fitted = of_checkpoint(self._fitted(before), first)
        return Eigenbasis(self.context.checkpoint(number).capture.blocks, fitted, self.context.device)

    def _counted(self, shard: Shard, progress: Progress, skip: int = 0) -> Iterator[Batch]:
        """Yield a shard's batches but for the first few examples."""
        for batch in self.context.batches(shard.checkpoint, self.rows[shard.start : shard.stop : shard.step][skip:]):
            yield batch
            progress.advance(len(batch))

    def _draws(self, stage: str, shard: Shard, progress: Progress) -> Iterator[Draws]:
        """Yield a shard's pseudo-gradients."""
        assert self.context.fisher is not None
        passes = self._first_draws if stage == "covariance" else self._later_draws
        return passes(shard, self.context.fisher, progress)

    def _first_draws(self, shard: Shard, fisher: Fisher, progress: Progress) -> Iterator[Draws]:
        """Yield pseudo-gradients as factors, and keep all that later passes need while memory lasts."""
        for _ in self._released(shard):
            pass  # of an attempt that was broken off
        kept, method, keeps = self._kept.setdefault(shard.ordinal, []), self._observer(shard.checkpoint), True
        for batch in self._counted(shard, progress):
            keeps = keeps and self._can_keep(shard, batch)
            if not keeps:
                yield fisher.draws(method.checkpoint.run(batch), method.checkpoint.task, batch)
                continue
            observed = method.observe(batch, fisher)
            yield observed.draws
            kept.append(observed.compact())
            self._kept_bytes += kept[-1].nbytes

    def _later_draws(self, shard: Shard, fisher: Fisher, progress: Progress) -> Iterator[Draws]:
        """Yield pseudo-gradients in the form they are kept in, whether they were or not: no rounding error then depends on memory."""
        kept, checkpoint = self._kept.get(shard.ordinal, ()), self.context.checkpoint(shard.checkpoint)
        for observed in kept:
            yield observed.draws
            progress.advance(len(observed))
        for batch in self._counted(shard, progress, skip=sum(map(len, kept))):
            yield [compact(draw) for draw in fisher.draws(checkpoint.run(batch), checkpoint.task, batch)]

    def _can_keep(self, shard: Shard, batch: Batch) -> bool:
        return self._kept_bytes + self.context.kept_bytes(shard.checkpoint) * len(batch) <= KEPT_BYTES

    def _released(self, shard: Shard) -> Iterator[Observed]:
        """Yield what earlier passes kept of a shard, and forget it on the way."""
        kept = deque(self._kept.pop(shard.ordinal, ()))
        while kept:
            self._kept_bytes -= kept[0].nbytes
            yield kept.popleft()

    def _observer(self, number: int) -> GradientMethod:
        """Return what differentiates, before there is a curvature."""
        return GradientMethod(self.context.checkpoint(number), Identity(), 0.0, None)

    def _reduced(self, stage: str) -> Arrays:
        if stage not in self._reductions:
            self._reductions[stage] = read_arrays(self.work / f"{stage}.safetensors")
        return self._reductions[stage]

    def _fitted(self, stages: Sequence[str]) -> Arrays:
        return {name: value for stage in stages for name, value in self._reduced(stage).items()}

    def _krylov(self, shard: Shard, progress: Progress) -> Arrays:
        method, products = self.spec.method, self.context.products(shard.checkpoint)
        assert isinstance(method, ArnoldiMethod)
        blocks = self._blocks(shard)
        size = sum(block.numel for block in blocks)
        over = product_over(products, partial(self.context.batches, shard.checkpoint), blocks)

        def product(vectors: Tensor) -> Tensor:
            progress.advance(0)
            return over(vectors)

        generator = torch.Generator().manual_seed(method.seed)
        start = torch.randn(size, generator=generator).to(next(products.capture.module.parameters()))
        values, vectors = arnoldi(product, start, min(method.iterations, size))
        mean = mean_eigenvalue(product, size, start)
        progress.advance(shard.stop - shard.start)
        keep = slice(None, method.rank)
        return {
            "values": values[keep].cpu().numpy(),
            "vectors": vectors[:, keep].cpu().numpy(),
            "mean": np.array([abs(mean)]),
        }

    def _kernel_sum(self, shard: Shard, progress: Progress) -> Arrays:
        method, fisher = self.context.method(shard.checkpoint, {}), self.context.fisher
        assert isinstance(method, Trak)
        assert fisher is not None
        return {
            "kernel": sum((method.fisher_sum(batch, fisher) for batch in self._counted(shard, progress)), np.zeros(()))
        }

    def _features(self, shard: Shard, progress: Progress) -> Arrays:
        number = shard.checkpoint
        if number not in self._methods:
            before = [stage for stage in self.spec.method.stages if stage != "features"]
            self._methods[number] = self.context.method(number, self._fitted(before))
        method, encoded, done = self._methods[number], [], 0
        for observed in self._released(shard):
            encoded.append(self._encoded(method, observed))
            done += len(observed)
            progress.advance(len(observed))
        if done:
            release_freed()
        encoded += [self._encoded(method, batch) for batch in self._counted(shard, progress, skip=done)]
        return {name: self._placed(shard, [arrays[name] for arrays in encoded]) for name in encoded[0]}

    def _placed(self, shard: Shard, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Join batches and put zeros where examples are left out, so that a shard file holds consecutive rows of the data set."""
        first = self.rows[shard.start] if shard.start else self.spec.num_covered
        end = self.rows[shard.stop] if shard.stop < len(self.rows) else self.spec.dataset.num_examples
        joined = np.concatenate(parts)
        placed = np.zeros((end - first, *joined.shape[1:]), joined.dtype)
        placed[self.rows[shard.start : shard.stop] - first] = joined
        return placed

    def _encoded(self, method: FeatureMethod, part: Observed | Batch) -> Arrays:
        if not isinstance(method, GradientMethod):
            assert isinstance(part, Batch)
            found = method.encode_train(part)
            _check_finite(found, part)
            return found.arrays()
        observed = method.observe(part).compact() if isinstance(part, Batch) else part
        found = method.encode_observed(observed)
        _check_finite(found, observed.batch)
        arrays = found.arrays()
        if self.context.layout == "vectors" or self.spec.store.lossy:
            side = self._recall_side(method)
            arrays[_EXACT] = method.observed_scores(side, observed).T.cpu().numpy()
        if self.context.layout == "factors":
            assert self.spec.store.dtype != "binary"
            stored = encoded(observed.training, self.spec.store.dtype)
            _check_scales(stored, observed.batch)
            arrays |= {f"{_GRADIENT}{name}": value for name, value in stored.items()}
        return arrays

    def _recall_side(self, method: GradientMethod) -> QuerySide:
        """Return the preconditioned queries by which recall is measured, made once per checkpoint."""
        if method not in self._recall_sides:
            queries = self.context.source.batch(recall_rows(self.context.training_rows))
            self._recall_sides[method] = method.precondition(method.encode_query(queries), method.default_damping)
        return self._recall_sides[method]

    def _exact_scores(self, index: LoadedIndex, files: Sequence[Path]) -> np.ndarray:
        """Return the exact scores (queries, n) of the queries by which recall is measured, averaged over checkpoints.

        Where rows are the method's own definition these are inner products of the rows as they were before they were stored.
        """
        ranges = len(files) // len(self.spec.checkpoints)
        query: Query | None = None
        joined = []
        for number in range(ranges):
            shards = [read_arrays(path) for path in files[number::ranges]]
            if _EXACT in shards[0]:
                joined.append(np.mean([shard[_EXACT] for shard in shards], axis=0))
                continue
            if query is None:
                query = index.query(self.context.source.batch(recall_rows(self.context.training_rows)), None)
            rows, weights = _side_by_side(shards)
            joined.append(rows @ query.rows.T * weights[:, None])
        return np.concatenate(joined).T

    def _feature_kernel(self, number: int, files: Sequence[Path]) -> Arrays:
        method, shards = self.spec.method, (read_arrays(path) for path in files)
        if isinstance(method, TrakMethod) and method.curvature != "fisher":
            return trak.kernel_of(shards, weighted=self._weighs_rows(method))
        if isinstance(method, LograMethod):
            member = self.context.method(number, {})
            assert isinstance(member, Logra)
            return fisher_of(shards, member.projection, self.spec.num_training)
        return {}

    def _weighs_rows(self, method: TrakMethod) -> bool:
        # For squared errors the curvature of the loss in the prediction is 1.
        return method.curvature == "gauss_newton" and not isinstance(self.spec.task, RegressionTask)

    def _write_features(self, into: Path, files: Sequence[Path], first: int = 0) -> None:
        """Join each range's shards of all checkpoints side by side, in files numbered from `first` on."""
        ranges = len(files) // len(self.spec.checkpoints)
        for number in range(ranges):
            shards = [read_arrays(path) for path in files[number::ranges]]
            rows, weights = _side_by_side(shards)
            if "self_influence" in shards[0]:
                own = np.mean([shard["self_influence"] for shard in shards], axis=0)
            else:
                own = self._late_self_influence(shards) * weights
            write_shard(into / FEATURES_FOLDER, first + number, rows, weights, own, dtype=self.spec.store.dtype)
            if self.context.layout == "factors":
                write_gradients(into / GRADIENTS_FOLDER, first + number, [_gradients_of(shard) for shard in shards])

    def _late_self_influence(self, shards: Sequence[Arrays]) -> np.ndarray:
        """Return `mean_m ⟨(K + λ)⁻¹ P∇m_i, φ_i⟩` of one range's rows, known only now that the kernel is."""
        total = np.zeros(len(shards[0]["rows"]))
        for number, shard in enumerate(shards):
            member = self.context.method(number, self._fitted(self.spec.method.stages))
            own = torch.from_numpy(shard.get("measured", shard["rows"]))
            solved = member.precondition(QuerySide(own, own), getattr(self.spec.method, "damping", 0.0)).rows
            total += np.einsum("ik,ik->i", solved.numpy(), shard["rows"], dtype=np.float64) / len(shards)
        return total

    def _write_search(self, into: Path) -> None:
        if self.spec.search.type == "flat" or self.context.layout == "factors":
            return  # an exhaustive search reads the rows themselves
        from attribution_core.search.faiss_index import VectorIndex  # noqa: PLC0415, megabytes that few indexes need

        store = FeatureStore(into / FEATURES_FOLDER, self.spec.dataset.num_examples)
        VectorIndex.build(self.spec.search, store).write(into / SEARCH_FILE)


AnyPipeline = FitPipeline | MagicPipeline | BankPipeline


def build_pipeline(spec: FitSpec, work: Path, device: str = "cpu") -> AnyPipeline:
    """Return what runs the parts of a method's fit."""
    match spec.method.keeps:
        case "scores":
            return MagicPipeline(spec, work, device)
        case "bank":
            return BankPipeline(spec, work, device, opened_priors(spec, device))
    return FitPipeline(spec, work, device)


def fit(spec: FitSpec, work: Path, into: Path, progress: Progress, device: str = "cpu") -> FitSummary:
    """Run a whole fit in this process; the service runs the same parts as jobs."""
    return run(build_pipeline(spec, work, device), into, progress)


def run(pipeline: AnyPipeline, into: Path, progress: Progress) -> FitSummary:
    """Run all parts of a pipeline in this process, and remove its work."""
    work, files = pipeline.work, list[Path]()
    for stage in pipeline.stages():
        files = [work / stage.name / f"{shard.ordinal:05d}.safetensors" for shard in stage.shards]
        for shard, path in zip(stage.shards, files, strict=True):
            write_arrays(path, pipeline.run_shard(stage.name, shard.ordinal, progress))
        write_arrays(work / f"{stage.name}.safetensors", pipeline.reduce(stage.name, files))
    into.mkdir(parents=True, exist_ok=True)
    summary = pipeline.assemble(into, files, progress)
    shutil.rmtree(work)
    return summary


def summed_arrays(files: Sequence[Path]) -> Arrays:
    """Return the sums over files of arrays of the same name."""
    total: Arrays = {}
    for path in files:
        for name, value in read_arrays(path).items():
            total[name] = total[name] + value if name in total else value
    return total


def _side_by_side(shards: Sequence[Arrays]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows (count, k) and weights (count,) of one range from the shards of all checkpoints."""
    rows = np.concatenate([shard["rows"] for shard in shards], axis=1)
    return rows, np.mean([shard["weights"] for shard in shards], axis=0)


def _gradients_of(shard: Arrays) -> Arrays:
    return {name.removeprefix(_GRADIENT): value for name, value in shard.items() if name.startswith(_GRADIENT)}


def _check_scales(stored: Arrays, batch: Batch) -> None:
    scales = np.stack([value for name, value in stored.items() if name.endswith(".scale")])
    unusable = ~np.isfinite(scales).all(axis=0)
    if unusable.any():
        row = int(batch.rows[int(np.flatnonzero(unusable)[0])])
        raise InvalidInputError(f"the model gives no finite gradient for training example {row}")


def _check_finite(found: TrainRows, batch: Batch) -> None:
    finite = found.rows.isfinite().all(dim=1) & found.weights.isfinite()
    if not bool(finite.all()):
        row = int(batch.rows[~finite][0])
        raise InvalidInputError(f"the model gives no finite gradient for training example {row}")
