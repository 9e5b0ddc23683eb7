"""Trainings and retrainings as shards: groups of runs that train as one program, each written as one file.

A training's file holds every saved step as `<step>.<parameter>` (runs, *shape), with `steps`, `epochs` and `learning_rates`, and `diverged`
(runs,). Which runs share a group depends on nothing but the work, so every attempt writes the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attribution_core.arrays import read_arrays
from attribution_core.checkpoints import save_checkpoint
from attribution_core.progress import Progress
from attribution_core.sharding import Stage
from attribution_core.training.bank import DIVERGED
from attribution_core.training.spec import MODELS_PER_GROUP, Semantics, TrainSpec
from attribution_core.training.trainer import Run, Snapshot, Trainer

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class RunGroup:
    """Runs of one shard.

    Attributes:
        units: steps of all of them together.
    """

    ordinal: int
    runs: tuple[Run, ...]
    units: int


def run_groups(trainer: Trainer, runs: Sequence[Run], semantics: Semantics, first: int = 0) -> list[RunGroup]:
    """Divide runs into groups of at most 32, numbered from `first`."""
    size = min(MODELS_PER_GROUP, trainer.models_at_once())
    parts = [tuple(runs[start : start + size]) for start in range(0, len(runs), size)]
    return [
        RunGroup(first + number, part, sum(trainer.num_steps(run, semantics) for run in part))
        for number, part in enumerate(parts)
    ]


class TrainingPipeline:
    """Trains a model on everything with several seeds.

    Args:
        spec: what is trained.
        seeds: one run each.
        save_every: steps between checkpoints; only the last if None.
        device: where torch computes.
    """

    def __init__(self, spec: TrainSpec, seeds: Sequence[int], save_every: int | None, device: str = "cpu") -> None:
        self.trainer = Trainer(spec, device)
        self.seeds, self.save_every = list(seeds), save_every
        everything = [Run(spec.everything(), seed) for seed in seeds]
        self._groups = run_groups(self.trainer, everything, "resample")

    def stages(self) -> list[Stage]:
        """Return the one stage."""
        return [Stage("training", tuple(self._groups))]

    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> Arrays:
        """Train one group of seeds and return every saved step."""
        group = self._groups[ordinal]
        saved: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
        rates: dict[int, tuple[float, float]] = {}

        def save(snapshot: Snapshot) -> None:
            rates[snapshot.step] = (snapshot.epoch, snapshot.learning_rate)
            for name, value in snapshot.parameters.items():
                saved.setdefault(f"{snapshot.step}.{name}", []).append((snapshot.runs, value.detach().cpu()))

        trained = self.trainer.train(group.runs, "resample", progress, save, self.save_every)
        arrays = {name: _ordered(parts) for name, parts in saved.items()}
        steps = sorted(rates)
        return arrays | {
            DIVERGED: trained.diverged.astype(np.uint8),
            "steps": np.array(steps, np.int64),
            "epochs": np.array([rates[step][0] for step in steps], np.float64),
            "learning_rates": np.array([rates[step][1] for step in steps], np.float64),
        }

    def reduce(self, stage: str, shard_files: Sequence[Path], progress: Progress) -> Arrays:
        """Return nothing: every group stands for itself."""
        return {}

    def write_checkpoints(self, files: Sequence[Path], folder: Path) -> "list[TrainedCheckpoint]":
        """Write each saved step of each seed that did not diverge as safetensors, and say what they are."""
        written: list[TrainedCheckpoint] = []
        for group, path in zip(self._groups, files, strict=True):
            arrays = read_arrays(path)
            steps = arrays["steps"].tolist()
            for place, run in enumerate(group.runs):
                if arrays[DIVERGED][place]:
                    continue
                for number, step in enumerate(steps):
                    target = folder / f"{run.seed}-{step}.safetensors"
                    self._write(arrays, step, place, target)
                    facts = (float(arrays["epochs"][number]), float(arrays["learning_rates"][number]))
                    written.append(TrainedCheckpoint(target, run.seed, step, *facts, final=step == steps[-1]))
        return written

    def diverged(self, files: Sequence[Path]) -> list[int]:
        """Return the seeds whose weights stopped being finite."""
        flags = np.concatenate([read_arrays(path)[DIVERGED] for path in files])
        return [seed for seed, flag in zip(self.seeds, flags, strict=True) if flag]

    def _write(self, arrays: Arrays, step: int, place: int, target: Path) -> None:
        prefix = f"{step}."
        weights = {
            name.removeprefix(prefix): torch.from_numpy(value[place])
            for name, value in arrays.items()
            if name.startswith(prefix)
        }
        save_checkpoint(self.trainer.network.loaded(weights), target)


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A saved step of one seed's training.

    Attributes:
        epoch: epochs begun.
        learning_rate: of the last step.
        final: the end of its run.
    """

    path: Path
    seed: int
    step: int
    epoch: float
    learning_rate: float
    final: bool


def _ordered(parts: Sequence[tuple[tuple[int, ...], Tensor]]) -> np.ndarray:
    """Join the parts of a group's runs in the runs' order."""
    numbers = [number for runs, _ in parts for number in runs]
    joined = torch.cat([value for _, value in parts]).float().numpy()
    ordered: np.ndarray = joined[np.argsort(numbers)]
    return ordered
