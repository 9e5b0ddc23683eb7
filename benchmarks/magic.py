"""How well the deterministic protocol is predicted by exact replay and by methods that follow a training: `python -m benchmarks.magic`.

One training of a small perceptron on 1,000 digits, and the same seed's training with random examples weighing zero. Trained twice: as
the workload mnist-mlp is (ReLU), and smoothly (GELU, a quarter of the learning rate). The ceiling is what the exact derivative ranks, found
by finite differences in float64: no method that differentiates this training can do better but by luck.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribution_core.checkpoints import save_checkpoint
from attribution_core.data.batch import Batch
from attribution_core.evaluate.lds import linear_datamodeling_score
from attribution_core.evaluate.ranks import spearman
from attribution_core.evaluate.retrainings import Retrainings
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef, FitSpec
from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.pairs import all_scores
from attribution_core.progress import NoProgress
from attribution_core.training.replay import Replay, metasmoothness
from attribution_core.training.spec import Protocol, TrainSpec, subset_mask
from attribution_core.training.trainer import Run, Snapshot, Trainer
from benchmarks.ours import dataset_of
from benchmarks.workloads import WORKLOADS, batch_of, prepare

SEED, MEASUREMENT, NEAR, CHECKPOINTS, AT_ONCE = 0, "margin", 1e-6, 10, 20
ALPHAS = (0.99, 0.95)
WORKLOAD = WORKLOADS["mnist-mlp"]
VARIANTS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu", "rate": 1.0},
    "gelu, a quarter of the rate": {"activation": "gelu", "rate": 0.25},
}
METHODS: dict[str, dict[str, Any]] = {
    "tracin": {"type": "tracin"},
    "gas": {"type": "gas"},
    "source": {"type": "source", "segments": 3, "momentum": 0.9, "l2": WORKLOAD.recipe.weight_decay},
    "ekfac": {"type": "ekfac"},
}


class Problem:
    """One variant of the training, with queries."""

    def __init__(self, activation: str, rate: float, queries: int, epochs: int, folder: Path) -> None:
        data = prepare(WORKLOAD)
        arguments = {**WORKLOAD.architecture["arguments"], "activation": activation}
        self.folder = folder
        self.spec: dict[str, Any] = {
            "architecture": {**WORKLOAD.architecture, "arguments": arguments},
            "task": {"type": "classification"},
            "dataset": dataset_of(WORKLOAD, data),
        }
        recipe = {
            "optimizer": {"type": "sgd", "momentum": 0.9, "nesterov": True},
            "learning_rate": WORKLOAD.recipe.learning_rate * rate,
            "schedule": {"type": "cosine", "warmup_fraction": 0.1},
            "weight_decay": WORKLOAD.recipe.weight_decay,
            "epochs": epochs,
            "batch_size": WORKLOAD.recipe.batch_size,
        }
        self.single, self.double = (
            Trainer(TrainSpec.model_validate({**self.spec, "recipe": recipe}), dtype=dtype)
            for dtype in (torch.float32, torch.float64)
        )
        self.queries: Batch = batch_of({name: value[:queries] for name, value in data.items()}, "query")

    @property
    def n(self) -> int:
        """Training examples."""
        return len(self.single.data)

    def masks(self, alpha: float, subsets: int) -> np.ndarray:
        """Return which examples each retraining keeps, (subsets, n)."""
        protocol = Protocol(alpha=alpha, subsets=subsets, semantics="mask")
        return np.stack([subset_mask(protocol, self.n, number) for number in range(subsets)])

    def values(self, weights: np.ndarray) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """Return the measurements (models, queries) in float64 after training with each row of weights, and the models."""
        replay = Replay(self.double, SEED)
        parts = [replay.trained(torch.from_numpy(weights[k : k + AT_ONCE])) for k in range(0, len(weights), AT_ONCE)]
        stacked = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        output = self.double.network.outputs(stacked, self.queries.to(torch.float64))
        task = self.double.network.task
        return np.stack([task.measure(one, self.queries, MEASUREMENT).numpy() for one in output]), stacked

    def checkpoints(self) -> list[CheckpointRef]:
        """Train once and return evenly spaced checkpoints."""
        run, every = Run(np.ones(self.n, bool), SEED), len(Replay(self.single, SEED).plan) // CHECKPOINTS
        found: list[CheckpointRef] = []

        def save(snapshot: Snapshot) -> None:
            path = self.folder / f"{snapshot.step}.safetensors"
            save_checkpoint(self.single.network.loaded({k: v[0] for k, v in snapshot.parameters.items()}), path)
            found.append(
                CheckpointRef(
                    id=path.stem,
                    path=path,
                    sha256=sha256_file(path),
                    run="one",
                    step=snapshot.step,
                    learning_rate=snapshot.learning_rate,
                )
            )

        self.single.train([run], "mask", save=save, save_every=every)
        return found

    def replayed(self) -> np.ndarray:
        """Return MAGIC's scores (queries, n)."""
        replay = Replay(self.single, SEED)
        recording = replay.record()
        _, gradients = replay.measured(recording.end.parameters, self.queries, MEASUREMENT)
        return replay.scores(recording, gradients).numpy()

    def fitted(self, name: str, checkpoints: list[CheckpointRef]) -> np.ndarray:
        """Return a method's scores (queries, n)."""
        used = checkpoints[-1:] if name == "ekfac" else checkpoints
        spec = FitSpec.model_validate(
            {**self.spec, "checkpoints": used, "method": METHODS[name], "measurement": MEASUREMENT, "shard_size": 4096}
        )
        fit(spec, self.folder / f"{name}-work", self.folder / name, NoProgress())
        index = LoadedIndex(self.folder / name, spec)
        return all_scores(index, self.queries)


def measure(variant: str, queries: int, subsets: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Return every method's LDS and CPU seconds on one variant, with the ceiling and the metasmoothness."""
    problem = Problem(**VARIANTS[variant], queries=queries, epochs=epochs, folder=folder)
    rows: dict[str, dict[str, float]] = {}
    scores: dict[str, np.ndarray] = {}
    checkpoints = problem.checkpoints()
    for name in ("magic", *METHODS):
        began = time.process_time()
        scores[name] = problem.replayed() if name == "magic" else problem.fitted(name, checkpoints)
        rows[name] = {"cpu_seconds": round(time.process_time() - began, 1)}
    rows["ceiling"] = {}
    start, whole = problem.values(np.ones((1, problem.n)))
    smoothness = {}
    for alpha in ALPHAS:
        masks = problem.masks(alpha, subsets)
        left_out = (~masks).astype(np.float64)
        truth, ends = problem.values(1 - left_out)
        near, _ = problem.values(1 - NEAR * left_out)
        bank = Retrainings(masks, truth[:, None])
        for name, found in scores.items():
            rows[name][str(alpha)] = linear_datamodeling_score(found, bank).lds
        slope = (near - start) / NEAR
        rows["ceiling"][str(alpha)] = float(np.mean(spearman(slope.T, truth.T)))
        half = problem.values(1 - left_out[:1] / 2)[1]
        smoothness[str(alpha)] = metasmoothness(
            *({name: value[0] for name, value in one.items()} for one in (whole, half, ends))
        )
    return {"variant": variant, "metasmoothness": smoothness, "methods": rows}


def main() -> None:
    """Measure both variants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=15)
    arguments = parser.parse_args()
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(variant, arguments.queries, arguments.subsets, arguments.epochs, Path(folder))
        print(json.dumps({"variant": variant, "metasmoothness": found["metasmoothness"]}))
        for name, row in found["methods"].items():
            print(f"| {name} | {row['0.99']:.3f} | {row['0.95']:.3f} | {row.get('cpu_seconds', '')} |", flush=True)


if __name__ == "__main__":
    main()
