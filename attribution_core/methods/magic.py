"""MAGIC as a fit: one training is recorded, judged by masked retrainings, and replayed backwards for groups of queries.

Source: Ilyas & Engstrom 2025, MAGIC: Near-Optimal Data Attribution for Deep Learning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution_core.arrays import read_arrays
from attribution_core.bank_methods.checks import check_retrainings
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.ranks import spearman
from attribution_core.fit_spec import FitSpec, FitSummary
from attribution_core.method_spec import MagicMethod
from attribution_core.methods.context import FitContext
from attribution_core.methods.dense import DenseScores, query_keys
from attribution_core.progress import Progress, watched
from attribution_core.sharding import Stage, shard_ranges
from attribution_core.training.optimizers import Tensors
from attribution_core.training.replay import Moment, Recording, Replay, metasmoothness
from attribution_core.training.spec import Protocol, TrainSpec, subset_mask
from attribution_core.training.trainer import Trainer

Arrays = dict[str, np.ndarray]
# What a recording may take, twice: as kept and as computed again.
MAX_RECORDED_BYTES = 4 << 30
_QUERIES_AT_ONCE = 64
_SUBSETS_AT_ONCE = 8
# How far the finite difference goes from the full weights towards a mask.
_NEAR = 1e-6


@dataclass(frozen=True)
class Part:
    """Queries, or masked retrainings, `start … stop - 1`; progress counts steps of training, forwards and backwards."""

    ordinal: int
    start: int
    stop: int
    units: int


class MagicPipeline:
    """Runs the parts of one fit; see `FitPipeline`.

    Args:
        spec: what is fitted.
        work: folder where reduced arrays of finished stages are, as `<stage>.safetensors`.
        device: where torch computes.

    Raises:
        InvalidInputError: if the recipe does not fit the data, the model cannot be replayed, or recording it takes too much memory.
    """

    def __init__(self, spec: FitSpec, work: Path, device: str = "cpu") -> None:
        assert isinstance(spec.method, MagicMethod)
        check_retrainings(spec)
        self.spec, self.method, self.work = spec, spec.method, work
        self.context = FitContext(spec, device)
        self.replay = Replay(Trainer(train_spec(spec), device), self.method.seed)
        self._check_size()

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        return [Stage(name, self._parts(name)) for name in self.method.stages]

    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> Arrays:
        """Compute one shard of a stage; progress counts steps.

        Raises:
            InvalidInputError: if the training diverges.
            Cancelled: if the work should stop.
        """
        part = self._parts(stage)[ordinal]
        match stage:
            case "recording":
                recording = self.replay.record(progress)
                _check_finite(recording.end.parameters)
                return _arrays(recording)
            case "masked":
                return self._masked(part, progress)
            case _:
                return {"scores": self._scores(part, progress).cpu().numpy()}

    def reduce(self, stage: str, shard_files: Sequence[Path], progress: Progress) -> Arrays:
        """Combine a stage's shard files, given in order of their ordinals."""
        shards = [read_arrays(path) for path in watched(shard_files, progress)]
        if stage == "recording":
            return shards[0]
        return {name: np.concatenate([shard[name] for shard in shards if name in shard]) for name in shards[0]}

    def assemble(self, into: Path, files: Sequence[Path], progress: Progress) -> FitSummary:
        """Lay out the artifact in an empty folder."""
        scores = read_arrays(self.work / "replay.safetensors")["scores"]
        names = [name for name, _ in self.replay.trainer.network.module.named_parameters()]
        coverage: dict[str, Any] = {"percent": 100.0, "covered": names, "skipped": []}
        if self.method.subsets:
            coverage["replay"] = self._diagnostics(scores)
        queries = self._queries(0, len(self.method.queries.rows))
        answers = f"the rows of data set {self.method.queries.dataset} that it was fitted for, {_ranges(self.method.queries.rows)}"
        return DenseScores(scores, query_keys(queries), self._outputs(queries), answers, coverage).write(
            into, self.spec
        )

    def _parts(self, stage: str) -> list[Part]:
        steps, rows = len(self.replay.plan), len(self.method.queries.rows)
        match stage:
            case "recording":
                return [Part(0, 0, 1, steps)]
            case "masked":
                # The training itself, and half way to the first mask, come with the first retrainings.
                ranges = shard_ranges(self.method.subsets, max(1, min(_SUBSETS_AT_ONCE, self._at_once // 4)))
                return [
                    Part(number, start, stop, steps * (2 * (stop - start) + 2 * (number == 0)))
                    for number, (start, stop) in enumerate(ranges)
                ]
        ranges = shard_ranges(rows, min(_QUERIES_AT_ONCE, self._at_once))
        return [Part(number, start, stop, steps * (stop - start)) for number, (start, stop) in enumerate(ranges)]

    def _scores(self, part: Part, progress: Progress) -> Tensor:
        recording = self._recording
        queries = self._queries(part.start, part.stop)
        _, gradients = self.replay.measured(recording.end.parameters, queries, self.spec.measurement)
        return self.replay.scores(recording, gradients, progress)

    def _masked(self, part: Part, progress: Progress) -> Arrays:
        """Return measurements (models, queries) after training without each subset, and after hardly leaving it out, in float64."""
        replay = Replay(Trainer(self.replay.trainer.spec, self.context.device, torch.float64), self.method.seed)
        left_out = torch.from_numpy(~self._masks()[part.start : part.stop]).to(replay.trainer.device, torch.float64)
        weights = [1 - left_out, 1 - _NEAR * left_out]
        if part.ordinal == 0:
            weights += [torch.ones_like(left_out[:1]), 1 - left_out[:1] / 2]
        parameters = replay.trained(torch.cat(weights), progress)
        queries = self._queries(0, len(self.method.queries.rows), torch.float64)
        values = torch.stack(
            [
                replay.measured(_one(parameters, number), queries, self.spec.measurement)[0]
                for number in range(sum(len(part) for part in weights))
            ]
        ).cpu()
        count = len(left_out)
        found = {"masked": values[:count], "near": values[count : 2 * count]}
        if part.ordinal == 0:
            found["start"] = values[2 * count : 2 * count + 1]
            ends = (_one(parameters, number) for number in (2 * count, 2 * count + 1, 0))
            found["metasmoothness"] = torch.tensor([metasmoothness(*ends)], dtype=torch.float64)
        return {name: value.detach().numpy() for name, value in found.items()}

    def _diagnostics(self, scores: np.ndarray) -> dict[str, Any]:
        """Return how smooth the training is, and how well subsets' measurements are ranked by the derivative: at best, and by the scores."""
        measured = read_arrays(self.work / "masked.safetensors")
        truth = measured["masked"] - measured["start"]  # (subsets, queries)
        slope = (measured["near"] - measured["start"]) / _NEAR
        predicted = -(~self._masks()).astype(np.float64) @ scores.T.astype(np.float64)
        return {
            "metasmoothness": round(float(measured["metasmoothness"][0]), 6),
            "ceiling": _agreement(slope, truth),
            "lds": _agreement(predicted, truth),
            "alpha": self.method.alpha,
            "subsets": self.method.subsets,
        }

    def _masks(self) -> np.ndarray:
        """Return which examples each retraining keeps, (subsets, n)."""
        protocol = Protocol(alpha=self.method.alpha, subsets=self.method.subsets, semantics="mask")
        n = self.spec.dataset.num_examples
        return np.stack([subset_mask(protocol, n, number) for number in range(self.method.subsets)])

    def _queries(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Batch:
        assert self.spec.queries is not None
        source = self.context.source_of(self.spec.queries.folder, self.spec.queries.spec)
        return source.batch(np.asarray(self.method.queries.rows[start:stop])).to(dtype)

    def _outputs(self, queries: Batch) -> list[dict[str, Any]]:
        network, task = self.replay.trainer.network, self.context.task
        with torch.no_grad():
            output = network.output(self._recording.end.parameters, queries)
        values = task.measure(output, queries, self.spec.measurement).tolist()
        described = task.describe(output, queries, self.spec.measurement)
        return [{**entry, "value": value} for entry, value in zip(described, values, strict=True)]

    @cached_property
    def _recording(self) -> Recording:
        return _recording(read_arrays(self.work / "recording.safetensors"), self.replay.stride, self.context.device)

    @cached_property
    def _moment_bytes(self) -> int:
        trainer = self.replay.trainer
        return (1 + len(trainer.optimizer.moments)) * trainer.network.num_parameters * trainer.dtype.itemsize

    @cached_property
    def _at_once(self) -> int:
        """How many models would train at once in the memory set aside; a query's adjoint takes as much as a model."""
        return self.replay.trainer.models_at_once()

    def _check_size(self) -> None:
        needed = 2 * self.replay.stride * self._moment_bytes
        if needed > MAX_RECORDED_BYTES:
            raise InvalidInputError(
                f"replaying {len(self.replay.plan)} steps of this model takes {needed >> 20} MiB, and "
                f"{MAX_RECORDED_BYTES >> 20} are allowed: train fewer steps or a smaller model",
                "/method/type",
            )


def train_spec(spec: FitSpec) -> TrainSpec:
    """Return the training that a fit repeats."""
    assert spec.recipe is not None
    return TrainSpec(
        architecture=spec.architecture,
        task=spec.task,
        tokenizer=spec.tokenizer,
        tokenizer_path=spec.tokenizer_path,
        dataset=spec.dataset,
        recipe=spec.recipe,
        initial=spec.initial,
        left_out=spec.left_out,
    )


def _arrays(recording: Recording) -> Arrays:
    moments = {"end": recording.end} | {str(number): moment for number, moment in enumerate(recording.moments)}
    return {
        f"{key}.{side}.{name}": value.cpu().numpy()
        for key, moment in moments.items()
        for side, tensors in vars(moment).items()
        for name, value in tensors.items()
    }


def _recording(arrays: Arrays, stride: int, device: str) -> Recording:
    moments: dict[str, dict[str, Tensors]] = {}
    for path, value in arrays.items():
        key, side, name = path.split(".", 2)
        sides = moments.setdefault(key, {"parameters": {}, "state": {}})
        sides[side][name] = torch.from_numpy(value).to(device)
    end = Moment(**moments.pop("end"))
    return Recording(stride, [Moment(**moments[str(number)]) for number in range(len(moments))], end)


def _one(stacked: Tensors, number: int) -> Tensors:
    return {name: value[number] for name, value in stacked.items()}


def _check_finite(parameters: Tensors) -> None:
    if not all(bool(value.isfinite().all()) for value in parameters.values()):
        raise InvalidInputError("the training diverges, so there is nothing to attribute: lower the learning rate")


def _agreement(predicted: np.ndarray, truth: np.ndarray) -> float | None:
    """Return the mean over queries of Spearman's correlation over subsets, of (subsets, queries); None of fewer than two subsets."""
    if len(truth) < 2:
        return None
    return round(float(np.mean(spearman(predicted.T, truth.T))), 6)


def _ranges(rows: Sequence[int]) -> str:
    """Return row numbers in words, runs of them shortened, cut where they are many."""
    parts: list[list[int]] = []
    for row in sorted(set(rows)):
        if parts and row == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], row]
        else:
            parts.append([row])
    shown = ["-".join(map(str, part)) for part in parts[:20]]
    return ", ".join(shown + ["…"] * (len(parts) > 20))
