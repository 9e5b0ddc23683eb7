"""Unlearning as shards: groups of oracles where a comparison is wanted, then every method on every checkpoint.

A shard's result depends on nothing but the spec, so work can stop and go on anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.checkpoints import load_model, save_checkpoint
from attribution_core.data.batch import Batch
from attribution_core.data.collate import ExampleSource
from attribution_core.errors import AttributionError, InvalidInputError
from attribution_core.progress import Progress, watched
from attribution_core.sharding import Stage, shard_ranges
from attribution_core.training.bank import WEIGHTS
from attribution_core.training.trainer import Run, Trainer
from attribution_core.unlearning.base import Subject, Unlearner, spread
from attribution_core.unlearning.evaluation import compared, klom_estimator, measured, summary
from attribution_core.unlearning.finetuning import DatamodelMatcher, FineTuneUnlearner, GradientAscentUnlearner
from attribution_core.unlearning.newton import ExactUnlearner, NewtonUnlearner
from attribution_core.unlearning.spec import (
    DatamodelMatching,
    ExactNewton,
    FineTune,
    GradientAscent,
    Newton,
    UnlearningMethod,
    UnlearnSpec,
)

Arrays = dict[str, np.ndarray]
MAX_RETAINED = 4096
_ORACLES_PER_SHARD = 8
_REPORT = "report."
_NOTHING = "nothing"


@dataclass(frozen=True)
class Shard:
    """Oracles `start … stop - 1`, or one method (`start`) on one checkpoint (`stop`)."""

    ordinal: int
    units: int
    start: int
    stop: int


@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint without the forget set.

    Attributes:
        source: id of the checkpoint it was made from.
        path: of its weights.
        report: numbers about how it went.
    """

    source: str
    path: Path
    report: dict[str, float]


class UnlearnPipeline:
    """Runs the parts of one unlearning.

    Args:
        spec: what is unlearned, and how.
        work: folder where reduced arrays of finished stages are, as `<stage>.safetensors`.
        device: where torch computes.

    Raises:
        InvalidInputError: if the spec cannot be done.
        FingerprintMismatchError: if data, weights or index are not those named.
    """

    def __init__(self, spec: UnlearnSpec, work: Path, device: str = "cpu") -> None:
        self.spec, self.work = spec, work
        self.subject = Subject(spec, device)
        self.unlearners = [build_unlearner(self.subject, method) for method in spec.methods()]
        self.checkpoints = spec.fit.answering()

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        unlearn = Stage("unlearn", self._unlearnings())
        return [Stage("oracles", self._oracles()), unlearn] if self.spec.oracles else [unlearn]

    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> Arrays:
        """Compute one shard.

        Returns:
            `weights.<name>`, of stacked oracles with `diverged`, or of one unlearned checkpoint with `report.<number's name>`.

        Raises:
            InvalidInputError: if a method cannot be applied, or its weights are no longer finite.
            Cancelled: from progress.
        """
        if stage == "oracles":
            return self._trained(self._oracles()[ordinal], progress)
        shard = self._unlearnings()[ordinal]
        found = self.unlearners[shard.start].unlearn(self.checkpoints[shard.stop], progress)
        if shard.start == 0 and not found.finite:
            raise InvalidInputError(
                "the new weights are no longer finite: take smaller or fewer steps, or more damping", "/method"
            )
        weights = {WEIGHTS + name: value.detach().float().cpu().numpy() for name, value in found.parameters.items()}
        return weights | {_REPORT + name: np.array([value]) for name, value in found.report.items()}

    def reduce(self, stage: str, shard_files: Sequence[Path], progress: Progress) -> Arrays:
        """Measure a stage's models, in arrays `<who>.<set>.<what>` (models, examples), `who` being `oracles`, `nothing` or a method's number.

        Diverged models are left out. Without a comparison there is nothing to measure.

        Raises:
            AttributionError: if fewer than two oracles are left.
            Cancelled: if the work should stop.
        """
        if not self.spec.oracles:
            return {"models": np.array([len(shard_files)])}
        if stage == "oracles":
            oracles = [
                module for path in watched(shard_files, progress) for module in self._oracle_modules(read_arrays(path))
            ]
            if len(oracles) < 2:
                raise AttributionError("the retrainings without the forget set diverged: nothing to compare with")
            return self._measured("oracles", oracles, progress)
        original = [self.subject.context.checkpoint(number).module for number in self.checkpoints]
        reduced = self._measured(_NOTHING, original, progress)
        size = len(self.checkpoints)
        for number in range(len(self.unlearners)):
            files = shard_files[number * size : (number + 1) * size]
            modules = [self._module(place, read_arrays(path)) for place, path in enumerate(watched(files, progress))]
            reduced |= self._measured(str(number), [module for module in modules if _finite(module)], progress)
        return reduced

    def conclude(self, files: Sequence[Path], folder: Path) -> tuple[list[NewCheckpoint], dict[str, Any] | None]:
        """Write the new checkpoints and return them with the comparison, None where none was asked for.

        Args:
            files: the stage `unlearn`'s shard files in order.
            folder: empty; gets a file per checkpoint.
        """
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for place, number in enumerate(self.checkpoints):
            arrays, path = read_arrays(files[place]), folder / f"{place:03d}.safetensors"
            save_checkpoint(self._module(place, arrays), path)
            report = {name.removeprefix(_REPORT): float(value[0]) for name, value in _reported(arrays).items()}
            written.append(NewCheckpoint(self.spec.fit.members[number].checkpoint.id, path, report))
        return written, self._evaluation() if self.spec.oracles else None

    def _oracles(self) -> list[Shard]:
        ranges = shard_ranges(self.spec.oracles, _ORACLES_PER_SHARD)
        assert self.spec.train is not None
        steps = self.spec.train.recipe.num_steps(self._trained_on)
        return [Shard(ordinal, (stop - start) * steps, start, stop) for ordinal, (start, stop) in enumerate(ranges)]

    @property
    def _trained_on(self) -> int:
        """How many examples an oracle's steps are over."""
        assert self.spec.train is not None
        return len(self.subject.retain) if self.spec.semantics == "resample" else self.spec.train.num_training

    def _unlearnings(self) -> list[Shard]:
        """Return the shards method by method; the one that is asked for comes first."""
        pairs = [(method, place) for method in range(len(self.unlearners)) for place in range(len(self.checkpoints))]
        return [
            Shard(ordinal, self.unlearners[method].units, method, place)
            for ordinal, (method, place) in enumerate(pairs)
        ]

    @cached_property
    def _trainer(self) -> Trainer:
        assert self.spec.train is not None
        return Trainer(self.spec.train, self.subject.device)

    def _trained(self, shard: Shard, progress: Progress) -> Arrays:
        seeds = range(self.spec.first_seed + shard.start, self.spec.first_seed + shard.stop)
        runs = [Run(self.spec.kept(), seed) for seed in seeds]
        trained = self._trainer.train(runs, self.spec.semantics, progress)
        weights = {WEIGHTS + name: value.float().cpu().numpy() for name, value in trained.parameters.items()}
        return {**weights, "diverged": trained.diverged.astype(np.uint8)}

    def _oracle_modules(self, arrays: Arrays) -> Iterator[nn.Module]:
        network = self._trainer.network
        for place in np.flatnonzero(arrays["diverged"] == 0):
            weights = {name: torch.from_numpy(value[place]) for name, value in _weights(arrays).items()}
            yield network.loaded(weights).eval()

    def _module(self, place: int, arrays: Arrays) -> nn.Module:
        """Return a checkpoint with new weights; what is no parameter stays the checkpoint's."""
        reference = self.spec.fit.members[self.checkpoints[place]].checkpoint
        module = load_model(self.spec.fit.architecture, reference.path, self.subject.device)
        for name, value in _weights(arrays).items():
            module.get_parameter(name).copy_(torch.from_numpy(value))
        return module

    def _measured(self, who: str, modules: Sequence[nn.Module], progress: Progress) -> Arrays:
        """Return arrays `<who>.<set>.<what>`, none if there are no modules."""
        found: Arrays = {}
        for name in self._sets if modules else []:
            task = self.subject.context.task
            each = [measured(module, task, watched(self._batches(name), progress)) for module in modules]
            for what in each[0]:
                found[f"{who}.{name}.{what}"] = np.stack([one[what] for one in each])
        return found

    @property
    def _sets(self) -> list[str]:
        return ["forget", "retain"] + (["test"] if self.spec.test else [])

    def _batches(self, name: str) -> Iterator[Batch]:
        """Yield the examples of a set; of those that stay up to 4,096, evenly spread."""
        context, test = self.subject.context, self.spec.test
        source, rows = context.source, self.subject.forget
        if name == "retain":
            rows = spread(self.subject.retain, MAX_RETAINED)
        elif name == "test":
            assert test is not None
            source = self._test_source
            rows = np.arange(test.dataset.num_examples) if test.rows is None else np.array(test.rows)
        return source.batches(rows, context.batch_size(0))

    @cached_property
    def _test_source(self) -> ExampleSource:
        assert self.spec.test is not None
        return self.subject.context.source_of(self.spec.test.dataset.folder, self.spec.test.dataset.spec)

    def _evaluation(self) -> dict[str, Any]:
        """Return the comparison of every method, and of doing nothing, with the oracles."""
        oracles = _grouped(read_arrays(self.work / "oracles.safetensors"))["oracles"]
        models = _grouped(read_arrays(self.work / "unlearn.safetensors"))
        count = len(next(iter(oracles.values()))["values"])
        described: list[tuple[str, str, dict[str, Any] | None]] = [(_NOTHING, _NOTHING, None)]
        for number, method in enumerate(self.spec.methods()):
            role = "baseline" if number else "method"
            described.append((str(number), role, method.model_dump(mode="json")))
        return {
            "measurement": self.subject.context.task.default_measurement,
            "klom_estimator": klom_estimator(count, len(self.checkpoints)),
            "semantics": self.spec.semantics,
            "oracles": {
                "trained": self.spec.oracles,
                "diverged": self.spec.oracles - count,
                "sets": {
                    name: {"examples": arrays["values"].shape[1], **summary(arrays)} for name, arrays in oracles.items()
                },
            },
            "results": [
                {
                    "role": role,
                    "method": method,
                    "diverged": len(self.checkpoints) - _models(models.get(who)),
                    "sets": {name: compared(oracles[name], arrays) for name, arrays in models.get(who, {}).items()},
                }
                for who, role, method in described
            ],
        }


def build_unlearner(subject: Subject, method: UnlearningMethod) -> Unlearner:
    """Return what carries a method out."""
    match method:
        case Newton():
            return NewtonUnlearner(subject, method)
        case ExactNewton():
            return ExactUnlearner(subject, method)
        case DatamodelMatching():
            return DatamodelMatcher(subject, method)
        case GradientAscent():
            return GradientAscentUnlearner(subject, method)
        case FineTune():
            return FineTuneUnlearner(subject, method)


def unlearn(
    spec: UnlearnSpec, work: Path, into: Path, progress: Progress, device: str = "cpu"
) -> tuple[list[NewCheckpoint], dict[str, Any] | None]:
    """Run everything in this process; the service runs the same parts as jobs. Shards whose files are there are not computed again."""
    pipeline = UnlearnPipeline(spec, work, device)
    files: list[Path] = []
    for stage in pipeline.stages():
        files = [work / stage.name / f"{shard.ordinal:05d}.safetensors" for shard in stage.shards]
        for shard, path in zip(stage.shards, files, strict=True):
            if not path.exists():
                write_arrays(path, pipeline.run_shard(stage.name, shard.ordinal, progress))
        write_arrays(work / f"{stage.name}.safetensors", pipeline.reduce(stage.name, files, progress))
    return pipeline.conclude(files, into)


def _weights(arrays: Arrays) -> Arrays:
    return {name.removeprefix(WEIGHTS): value for name, value in arrays.items() if name.startswith(WEIGHTS)}


def _reported(arrays: Arrays) -> Arrays:
    return {name: value for name, value in arrays.items() if name.startswith(_REPORT)}


def _finite(module: nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for value in module.parameters())


def _grouped(arrays: Arrays) -> dict[str, dict[str, Arrays]]:
    """Return arrays `<who>.<set>.<what>` as who → set → what."""
    found: dict[str, dict[str, Arrays]] = {}
    for name, value in arrays.items():
        who, which, what = name.split(".")
        found.setdefault(who, {}).setdefault(which, {})[what] = value
    return found


def _models(sets: dict[str, Arrays] | None) -> int:
    return len(next(iter(sets.values()))["values"]) if sets else 0
