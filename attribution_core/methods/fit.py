"""Fitting an index as deterministic shards and small reductions, so that any worker can do any shard and the bytes come out the same.

A fit is a list of stages. Each stage has shards that are pure functions of the spec and of earlier stages' reduced arrays, and one
reduction over its shards in order. `assemble` lays the results out as the artifact. There is no clock, random state or placement in any file.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.curvature import Eigenbasis
from attribution_core.curvature.dense import spectrum, summed_hessian
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.fisher import ShortfallSums
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.fit_spec import FitSpec, FitSummary
from attribution_core.gradients import Block
from attribution_core.memory import release_freed
from attribution_core.method_spec import (
    FisherMethod,
    HessianMethod,
    LograMethod,
    TrakMethod,
)
from attribution_core.methods import representer, trak
from attribution_core.methods.answers import Query
from attribution_core.methods.artifact import FACTORS_FILE, bytes_of, write_description
from attribution_core.methods.bank import BankPipeline
from attribution_core.methods.base import FeatureMethod
from attribution_core.methods.context import FitContext
from attribution_core.methods.copies import trained_weights
from attribution_core.methods.encoding import Encoder
from attribution_core.methods.finite import check_finite, naming_the_example
from attribution_core.methods.fitted import of_checkpoint, weights_of_copies
from attribution_core.methods.kept import KeptGradients
from attribution_core.methods.krylov import krylov
from attribution_core.methods.layout import exact_scores, write_features, write_search
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.logra import Logra, fisher_of
from attribution_core.methods.magic import MagicPipeline
from attribution_core.methods.opening import opened_priors
from attribution_core.methods.recall import measured_recall, recall_rows
from attribution_core.methods.representer import Representer
from attribution_core.methods.sums import by_name, defaults, eigenvectors, empty_sums, summed, summed_arrays, tempering
from attribution_core.methods.trak import Trak
from attribution_core.progress import NoProgress, Progress, watched
from attribution_core.sharding import Shard, Stage, shard_ranges

Arrays = dict[str, np.ndarray]
# Rows up to which stored self-influence was divided by which n.
Segment = tuple[int, int]
_MATRIX_SHARDS = 8


@contextmanager
def _of_method() -> Iterator[None]:
    """Say of a damping that is wrong that it is the method's: a fit has no other."""
    try:
        yield
    except InvalidInputError as error:
        if error.pointer == "/damping":
            error.pointer = "/method/damping"
        raise


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
        self.context.copy_weights = lambda: weights_of_copies(self._fitted(("copies",)))
        # What is computed: all rows that are trained on, or those that no earlier fit covers.
        self.rows = self.context.training_rows[self.context.training_rows >= spec.num_covered]
        self._reductions: dict[str, Arrays] = {}
        self._encoders: dict[int, Encoder] = {}
        self._kept = KeptGradients(self.context)

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        return [Stage(name, self._shards(name)) for name in self.spec.method.stages]

    @_of_method()
    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> Arrays:
        """Compute one shard of a stage; progress counts examples.

        Raises:
            InvalidInputError: if the data does not fit the model.
            SingularCurvatureError: if the method's damping is 0 and the curvature singular.
            Cancelled: if the work should stop.
        """
        shard = self._shards(stage)[ordinal]
        if stage == "copies":
            with naming_the_example(self.context, [0], progress):
                return trained_weights(self.context, shard.checkpoint, progress)
        if shard.start == 0:
            release_freed()  # else what each checkpoint's passes leave in pieces adds up over the ensemble
        self.context.check_capture(shard.checkpoint)
        with naming_the_example(self.context, [shard.checkpoint], progress):
            found = self._computed(stage, shard, progress)
            # Some methods have no self-influence until all rows are known, or at all.
            check_finite({name: value for name, value in found.items() if name != "self_influence"})
        return found

    def _computed(self, stage: str, shard: Shard, progress: Progress) -> Arrays:
        match stage:
            case "covariance" | "eigenvalues":
                sums = empty_sums(self.context, stage, shard.checkpoint, self._basis)
                for draws in self._draws(stage, shard, progress):
                    for each in sums:
                        each.add(draws)
                return by_name(sums)
            case "hessian":
                products, batches = self.context.curvatures.products(shard.checkpoint), self._counted(shard, progress)
                return {"hessian": summed_hessian(products, batches, self._blocks(shard))}
            case "krylov":
                return krylov(self.context, shard.checkpoint, progress)
            case "kernel":
                return self._kernel_sum(shard, progress)
            case "head":
                return self._head_examples(shard, progress)
            case _:
                return self._features(shard, progress)

    @_of_method()
    def reduce(self, stage: str, shard_files: Sequence[Path], progress: Progress) -> Arrays:
        """Combine a stage's shard files, given in order of their ordinals, into `<checkpoint>.<name>` arrays.

        Checkpoints that share a curvature have it under the first one's number. Progress counts nothing: it is asked between layers, files
        and blocks of rows whether the work should stop.

        Raises:
            InvalidInputError: if the data does not fit the model.
            Cancelled: if the work should stop.
        """
        size = len(shard_files) // len(self.spec.members)
        reduced: Arrays = {}
        for group in self.spec.curvature_groups():
            release_freed()  # likewise of decompositions
            files = [path for number in group for path in shard_files[number * size : (number + 1) * size]]
            found = self._reduction(stage, group, files, progress)
            reduced |= {f"{group[0]}.{name}": value for name, value in found.items()}
        return reduced | self._settled(stage, reduced, progress)

    def _reduction(self, stage: str, group: tuple[int, ...], files: Sequence[Path], progress: Progress) -> Arrays:
        n, number, method = self.spec.num_training * len(group), group[0], self.spec.method
        watched_files = watched(files, progress)
        match stage:
            case "covariance":
                sums = summed(self._of_these_sums(group, watched_files))
                return eigenvectors(self.context, group, sums, progress)
            case "eigenvalues":
                return {name: (value / n).astype(np.float32) for name, value in summed_arrays(watched_files).items()}
            case "hessian":
                assert isinstance(method, HessianMethod)
                mean = summed_arrays(watched_files)["hessian"] / n
                return spectrum(mean + method.l2 * np.eye(len(mean)))
            case "krylov" | "copies":
                return read_arrays(files[0])
            case "kernel":
                return trak.eigen(summed_arrays(watched_files)["kernel"])
            case "head":
                return self._representer(number).fit_head([read_arrays(path) for path in watched_files])
            case _:
                return self._feature_kernel(number, watched_files, progress)

    def _settled(self, stage: str, reduced: Arrays, progress: Progress) -> Arrays:
        """Return what an index keeps of its fit's defaults, after the stage that completes the curvature."""
        method = self.spec.method
        if not isinstance(method, FisherMethod) or stage != method.stages[-2]:
            return {}
        return defaults(self.context, self._fitted(method.stages[:-2]) | reduced, progress)

    @_of_method()
    def assemble(self, into: Path, feature_files: Sequence[Path], progress: Progress) -> FitSummary:
        """Lay out the artifact in an empty folder from the reduced stages and the `features` shards in order.

        Raises:
            Cancelled: if the work should stop; progress is asked between files and blocks of rows.
        """
        write_arrays(into / FACTORS_FILE, self._fitted(self.spec.method.stages))
        members = self._members()
        write_features(self.context, members, into, feature_files, progress)
        write_search(self.context, into, progress)
        self._describe(into, recall=None)
        index = LoadedIndex(into, self.spec, self.context, holds_rows=False)
        queries = partial(self._recall_queries, index, progress)
        exact = partial(exact_scores, self.context, members, feature_files, progress)
        recall = measured_recall(index, queries, exact)
        self._describe(into, recall=recall)
        return self._summary(into, index, recall)

    def _recall_queries(self, index: LoadedIndex, progress: Progress) -> Query:
        """Return the queries by which recall is measured, as they were preconditioned for the features if they were."""
        batch = self.context.source.batch(recall_rows(self.context.training_rows))
        members = range(len(self.spec.members))
        with naming_the_example(self.context, members, progress):
            made = [side for number in members if (side := self._encoder(number).recall_side) is not None]
            if len(made) < len(members):
                return index.query(batch, None)
            return index.joined(made, batch, index.default_damping)

    def _members(self) -> list[FeatureMethod]:
        """Return the fitted method on each checkpoint."""
        fitted = self._fitted(self.spec.method.stages)
        return [self.context.method(number, fitted) for number in range(len(self.spec.members))]

    def _describe(self, into: Path, *, recall: float | None, before: Sequence[Segment] = ()) -> None:
        segments = [*before, (self.spec.dataset.num_examples, self.spec.num_training)]
        described = {"fingerprint": self.spec.fingerprint(), "coverage": self._coverage(), "segments": segments}
        write_description(into, {**described, "recall": recall})

    def _coverage(self) -> dict[str, Any]:
        first = self.context.checkpoint(0).capture.coverage
        found = {"percent": first.percent, "covered": list(first.covered), "skipped": list(first.skipped)}
        if "head" not in self.spec.method.stages:
            return found
        heads, count = self._reduced("head"), len(self.spec.members)
        return {**found, "head": [representer.described(heads[f"{number}.distance"]) for number in range(count)]}

    def _summary(self, into: Path, index: LoadedIndex, recall: float) -> FitSummary:
        size = bytes_of(into)
        n = self.spec.num_training
        return FitSummary(self.spec.fingerprint(), len(index.store), index.dim, size, recall, self._coverage(), n)

    def _shards(self, stage: str) -> tuple[Shard, ...]:
        """Return a stage's shards; those whose result is a large matrix are few."""
        n, size = len(self.rows), self.spec.shard_size
        if stage in ("hessian", "kernel"):
            size = max(size, -(-n // _MATRIX_SHARDS))
        ranges = shard_ranges(n, n if stage in ("krylov", "copies") else size)
        return tuple(
            Shard(checkpoint * len(ranges) + number, checkpoint, start, stop)
            for checkpoint in range(len(self.spec.members))
            for number, (start, stop) in enumerate(ranges)
        )

    def _blocks(self, shard: Shard) -> list[Block]:
        return self.context.checkpoint(shard.checkpoint).capture.blocks

    def _of_these_sums(self, group: tuple[int, ...], files: Iterable[Path]) -> Iterator[Arrays]:
        """Yield shards of covariances of checkpoints that share them; those of a version that summed something else are computed again."""
        names = by_name(empty_sums(self.context, "covariance", group[0], self._basis)).keys()
        shards = (shard for shard in self._shards("covariance") if shard.checkpoint in group)
        for shard, path in zip(shards, files, strict=True):
            arrays = read_arrays(path)
            yield arrays if arrays.keys() == names else self.run_shard("covariance", shard.ordinal, NoProgress())

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
        fisher = self.context.pseudo_gradients.fisher_of(shard.checkpoint)
        batches = partial(self._counted, shard, progress)
        if stage == "covariance":
            return self._kept.first_draws(shard, batches, fisher)
        return self._kept.later_draws(shard, batches, fisher, progress.advance)

    def _reduced(self, stage: str) -> Arrays:
        if stage not in self._reductions:
            self._reductions[stage] = read_arrays(self.work / f"{stage}.safetensors")
        return self._reductions[stage]

    def _fitted(self, stages: Sequence[str]) -> Arrays:
        return {name: value for stage in stages for name, value in self._reduced(stage).items()}

    def _kernel_sum(self, shard: Shard, progress: Progress) -> Arrays:
        method = self.context.method(shard.checkpoint, {})
        fisher = self.context.pseudo_gradients.fisher_of(shard.checkpoint)
        assert isinstance(method, Trak)
        return {
            "kernel": sum((method.fisher_sum(batch, fisher) for batch in self._counted(shard, progress)), np.zeros(()))
        }

    def _head_examples(self, shard: Shard, progress: Progress) -> Arrays:
        member = self._representer(shard.checkpoint)
        parts = [member.examples(batch) for batch in self._counted(shard, progress)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _representer(self, number: int) -> Representer:
        member = self.context.method(number, {})
        assert isinstance(member, Representer)
        return member

    def _features(self, shard: Shard, progress: Progress) -> Arrays:
        encoder, encoded, done = self._encoder(shard.checkpoint), list[Arrays](), 0
        for observed in self._kept.released(shard):
            encoded.append(encoder.arrays(observed))
            done += len(observed)
            progress.advance(len(observed))
        if done:
            release_freed()
        encoded += [encoder.arrays(batch) for batch in self._counted(shard, progress, skip=done)]
        return {name: self._placed(shard, [arrays[name] for arrays in encoded]) for name in encoded[0]}

    def _encoder(self, number: int) -> Encoder:
        if number not in self._encoders:
            before = [stage for stage in self.spec.method.stages if stage != "features"]
            self._encoders[number] = Encoder(self.context, self.context.method(number, self._fitted(before)))
        return self._encoders[number]

    def _placed(self, shard: Shard, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Join batches and put zeros where examples are left out, so that a shard file holds consecutive rows of the data set."""
        first = self.rows[shard.start] if shard.start else self.spec.num_covered
        end = self.rows[shard.stop] if shard.stop < len(self.rows) else self.spec.dataset.num_examples
        joined = np.concatenate(parts)
        placed = np.zeros((end - first, *joined.shape[1:]), joined.dtype)
        placed[self.rows[shard.start : shard.stop] - first] = joined
        return placed

    def _feature_kernel(self, number: int, files: Iterable[Path], progress: Progress) -> Arrays:
        """Return what a method makes of all rows, once they are known."""
        method, shards = self.spec.method, (read_arrays(path) for path in files)
        if isinstance(method, TrakMethod):
            sums = ShortfallSums(self.context.defaults.residual_power)
            found = trak.reduced(method, self.spec.task, shards, sums)
            return found if sums.power == 1 else found | tempering(self.context, sums.values)
        if isinstance(method, LograMethod):
            member = self.context.method(number, {})
            assert isinstance(member, Logra)
            return fisher_of(shards, member.projection, self.spec.num_training, progress)
        return {}


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
    summary = run(build_pipeline(spec, work, device), into, progress)
    release_freed()
    return summary


def run(pipeline: AnyPipeline, into: Path, progress: Progress) -> FitSummary:
    """Run all parts of a pipeline in this process, and remove its work."""
    work, files = pipeline.work, list[Path]()
    for stage in pipeline.stages():
        files = [work / stage.name / f"{shard.ordinal:05d}.safetensors" for shard in stage.shards]
        for shard, path in zip(stage.shards, files, strict=True):
            write_arrays(path, pipeline.run_shard(stage.name, shard.ordinal, progress))
        write_arrays(work / f"{stage.name}.safetensors", pipeline.reduce(stage.name, files, progress))
    into.mkdir(parents=True, exist_ok=True)
    summary = pipeline.assemble(into, files, progress)
    shutil.rmtree(work)
    return summary
