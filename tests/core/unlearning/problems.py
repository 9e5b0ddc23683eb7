"""Small models to unlearn from: a logistic regression at its optimum, and perceptrons that learnt a source of their own class labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribution_core.checkpoints import save_checkpoint
from attribution_core.data.importer import import_dataset
from attribution_core.exact import LogisticRegression
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef, DatasetRef, FitSpec
from attribution_core.methods.fit import fit
from attribution_core.progress import NoProgress
from attribution_core.spec import ArchitectureSpec, ClassificationTask, DatasetSpec
from attribution_core.tasks import build_task
from attribution_core.training.network import Network
from attribution_core.training.spec import TrainSpec
from attribution_core.training.trainer import Run, Trainer
from attribution_core.unlearning.spec import UnlearnSpec

L2 = 0.02
N = 150
CLASSES = 3
LOGISTIC = {"name": "logistic", "arguments": {"input_dim": 4, "num_classes": CLASSES}}
MLP = {"name": "mlp", "arguments": {"input_dim": 4, "hidden": [16], "output_dim": CLASSES, "activation": "tanh"}}
SOURCE = np.arange(15)  # the rows of the source that is forgotten
RECIPE = {
    "optimizer": {"type": "sgd", "momentum": 0.9},
    "learning_rate": 0.1,
    "schedule": {"type": "cosine"},
    "weight_decay": 5e-3,
    "epochs": 30,
    "batch_size": 25,
}


@dataclass
class Problem:
    """An index over checkpoints on disk."""

    folder: Path
    fit: FitSpec
    inputs: np.ndarray
    targets: np.ndarray
    train: TrainSpec | None = None
    test: DatasetRef | None = None

    def spec(self, method: dict[str, Any], **chosen: Any) -> UnlearnSpec:
        return UnlearnSpec.model_validate(
            {
                "index": self.folder / "index",
                "fit": self.fit,
                "forget": SOURCE.tolist(),
                "method": method,
                "train": self.train,
                **chosen,
            }
        )


def blobs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes; the first tenth is a source of class 0 that lies half way to class 1."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((CLASSES, 4)) * 1.5
    targets = generator.integers(0, CLASSES, n)
    inputs = centres[targets] + generator.standard_normal((n, 4))
    source = n // 10
    inputs[:source] = (centres[0] + centres[1]) / 2 + 0.7 * generator.standard_normal((source, 4))
    targets[:source] = 0
    return inputs.astype(np.float32), targets


def dataset_of(folder: Path, name: str, inputs: np.ndarray, targets: np.ndarray) -> DatasetRef:
    (folder / f"{name}-data").mkdir(parents=True)
    np.savez(folder / f"{name}.npz", input=inputs, target=targets)
    spec = DatasetSpec(name=name, kind="tensor", shape=[inputs.shape[1]])
    summary = import_dataset(folder / f"{name}.npz", spec, folder / f"{name}-data", NoProgress())
    return DatasetRef(
        id=name, folder=folder / f"{name}-data", spec=spec, sha256=summary.sha256, num_examples=len(inputs)
    )


def indexed(
    folder: Path,
    architecture: dict[str, Any],
    dataset: DatasetRef,
    weights: Sequence[dict[str, torch.Tensor]],
    **chosen: Any,
) -> FitSpec:
    """Write checkpoints and fit an index to them."""
    network = Network(ArchitectureSpec(**architecture), build_task(ClassificationTask()))
    references = []
    for number, parameters in enumerate(weights):
        path = folder / f"{number}.safetensors"
        save_checkpoint(network.loaded(parameters), path)
        references.append(CheckpointRef(id=f"ckpt_{number}", path=path, sha256=sha256_file(path)))
    spec = FitSpec.model_validate(
        {
            "architecture": architecture,
            "task": {"type": "classification"},
            "dataset": dataset,
            "checkpoints": references,
            "method": {"type": "ekfac", "residual_power": 1},
            "measurement": "margin",
            **chosen,
        }
    )
    fit(spec, folder / "work", folder / "index", NoProgress())
    return spec


def logistic(folder: Path, **chosen: Any) -> Problem:
    """A softmax regression at the optimum of the mean loss + L2/2 ‖θ‖²."""
    inputs, targets = blobs(N, 0)
    theta = LogisticRegression.fit(features_of(inputs), targets, N * L2, num_outputs=CLASSES).parameters
    found = torch.from_numpy(theta).float()
    weights = {"output.weight": found[:, :-1], "output.bias": found[:, -1]}
    dataset = dataset_of(folder, "train", inputs, targets)
    return Problem(folder, indexed(folder, LOGISTIC, dataset, [weights], **chosen), inputs, targets)


def features_of(inputs: np.ndarray) -> np.ndarray:
    return np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1).astype(np.float64)


def refit(problem: Problem, forget: np.ndarray) -> np.ndarray:
    """The optimum (C, d) without some rows, of the mean loss of the others."""
    kept = np.delete(np.arange(N), forget)
    features, targets = features_of(problem.inputs)[kept], problem.targets[kept]
    return LogisticRegression.fit(features, targets, len(kept) * L2, num_outputs=CLASSES).parameters


def trained(folder: Path, seeds: int, **chosen: Any) -> Problem:
    """Perceptrons of several seeds, with the recipe they were trained by."""
    inputs, targets = blobs(N, 0)
    dataset = dataset_of(folder, "train", inputs, targets)
    test = dataset_of(folder, "test", *blobs(100, 1))
    spec = TrainSpec.model_validate(
        {"architecture": MLP, "task": {"type": "classification"}, "dataset": dataset, "recipe": RECIPE}
    )
    stacked = Trainer(spec).train([Run(np.ones(N, bool), seed) for seed in range(seeds)]).parameters
    weights = [{name: value[number] for name, value in stacked.items()} for number in range(seeds)]
    return Problem(folder, indexed(folder, MLP, dataset, weights, **chosen), inputs, targets, spec, test)
