"""The benchmark's workloads: a data set, an architecture, a recipe, five checkpoints and the truth by real retraining.

`python -m benchmarks.workloads NAME …` makes `benchmarks/.cache/workloads/NAME` (data, checkpoints) and the truth in `benchmarks/truth/NAME.npz`,
which is committed, as it costs minutes to hours; delete it to make it anew. `--list` names the workloads.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from attribution_core.architectures.build import build
from attribution_core.data.batch import Batch
from attribution_core.spec import ArchitectureSpec, CausalLanguageModelingTask, ClassificationTask
from attribution_core.tasks import Task, build_task
from benchmarks.data import CACHE, Arrays, load
from benchmarks.retraining import Recipe, train

TRUTH = Path(__file__).parent / "truth"
CHECKPOINT_SEEDS = tuple(range(5))


@dataclass(frozen=True)
class Workload:
    """One benchmark problem.

    Attributes:
        data: returns `train_inputs`, `query_inputs` and, for classification, `train_targets` and `query_targets`.
        subsets: random halves of the training set that are retrained.
        seeds: retrainings per subset; their mean is the truth.
        at_once: models trained in one batched program.
    """

    name: str
    architecture: dict[str, Any]
    data: Callable[[], Arrays]
    recipe: Recipe
    subsets: int
    seeds: int
    at_once: int
    task: str = "classification"
    measurement: str = "margin"

    @property
    def folder(self) -> Path:
        """Where data and checkpoints are."""
        return CACHE / "workloads" / self.name

    @property
    def truth(self) -> Path:
        """Where `masks` (subsets, n) and `values` (subsets, seeds, queries) are."""
        return TRUTH / f"{self.name}.npz"

    def build(self) -> torch.nn.Module:
        """Return a freshly initialised network."""
        return build(ArchitectureSpec(**self.architecture))

    def built_task(self) -> Task:
        """Return the task."""
        return build_task(ClassificationTask() if self.task == "classification" else CausalLanguageModelingTask())


def images(name: str, n: int, queries: int, pooled: bool) -> Callable[[], Arrays]:
    """Return what makes a data set of images, standardised; `pooled` ones are vectors of 14 x 14 means."""

    def make() -> Arrays:
        found = load(name)
        order = np.random.default_rng(0).permutation(len(found["labels"]))[: n + queries]
        images = found["images"][order].astype(np.float32)[:, None] / 255
        if pooled:
            images = images.reshape(-1, 1, 14, 2, 14, 2).mean((3, 5)).reshape(-1, 196)
        mean, std = images[:n].mean(), images[:n].std()
        return _split((images - mean) / std, found["labels"][order], n)

    return make


def _letters() -> Arrays:
    found = load("letter")
    order = np.random.default_rng(0).permutation(len(found["labels"]))[:2200]
    features = (found["features"][order] - found["features"].mean(0)) / found["features"].std(0)
    return _split(features, found["labels"][order], 2000)


def pieces(n: int, queries: int) -> Callable[[], Arrays]:
    """Return what makes a data set of pieces of Austen's novels, 64 characters each."""

    def make() -> Arrays:
        text = load("austen")["bytes"]
        vocabulary = np.unique(text)
        tokens = np.searchsorted(vocabulary, text).astype(np.int64)
        windows = len(tokens) // 64
        order = np.random.default_rng(0).permutation(windows)[: n + queries]
        chosen = tokens[: windows * 64].reshape(windows, 64)[order]
        return {"train_inputs": chosen[:n], "query_inputs": chosen[n:]}

    return make


def _split(inputs: np.ndarray, labels: np.ndarray, n: int) -> Arrays:
    return {
        "train_inputs": inputs[:n].astype(np.float32),
        "train_targets": labels[:n],
        "query_inputs": inputs[n:].astype(np.float32),
        "query_targets": labels[n:],
    }


_MLP = {"name": "mlp", "arguments": {"input_dim": 196, "hidden": [64, 64], "output_dim": 10}}
_CNN = {"name": "cnn", "arguments": {"input_shape": [1, 28, 28], "channels": [8, 16], "num_classes": 10, "hidden": 64}}
_LM = {
    "name": "transformer_lm",
    "arguments": {"vocab_size": 80, "width": 64, "depth": 2, "heads": 4, "max_length": 64},
}
_SGD = Recipe("sgd", 0.05, 1e-3, epochs=20, batch_size=50)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("mnist-mlp", _MLP, images("mnist", 1000, 200, True), _SGD, 100, 10, 100),
        Workload("fashion-mlp", _MLP, images("fashion", 1000, 200, True), _SGD, 100, 10, 100),
        Workload("mnist-cnn", _CNN, images("mnist", 2000, 200, False), Recipe("sgd", 0.05, 1e-3, 8, 50), 50, 4, 10),
        Workload("fashion-cnn", _CNN, images("fashion", 2000, 200, False), Recipe("sgd", 0.05, 1e-3, 8, 50), 50, 4, 10),
        Workload(
            "letter-logistic",
            {"name": "logistic", "arguments": {"input_dim": 16, "num_classes": 26}},
            _letters,
            Recipe("sgd", 0.0, 1e-3, 0, 0),
            100,
            1,
            1,
        ),
        Workload(
            "austen-lm",
            _LM,
            pieces(1000, 100),
            Recipe("adamw", 5e-3, 0.01, epochs=10, batch_size=25),
            50,
            4,
            10,
            "causal_lm",
            "log_likelihood",
        ),
    )
}


def prepare(workload: Workload) -> Arrays:
    """Make a workload's folder, unless it is there, and return its data."""
    done = workload.folder / "workload.json"
    if not done.exists():
        (workload.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        data = workload.data()
        np.savez_compressed(workload.folder / "data.npz", **data)
        everything = [np.arange(len(data["train_inputs"]))] * len(CHECKPOINT_SEEDS)
        for seed, state in enumerate(_trained(workload, data, everything, CHECKPOINT_SEEDS)):
            save_file(state, workload.folder / "checkpoints" / f"{seed}.safetensors")
        done.write_text(json.dumps(_described(workload), indent=1))
    with np.load(workload.folder / "data.npz") as file:
        return {key: file[key] for key in file.files}


def retrain(workload: Workload, data: Arrays) -> None:
    """Write a workload's truth, unless it is there."""
    if workload.truth.exists():
        return
    n = len(data["train_inputs"])
    generator = np.random.default_rng(1)
    subsets = [np.sort(generator.permutation(n)[: n // 2]) for _ in range(workload.subsets)]
    jobs = [(subset, 1000 + seed) for subset in subsets for seed in range(workload.seeds)]
    values = retrained(workload, data, jobs)
    masks = np.zeros((len(subsets), n), bool)
    for number, subset in enumerate(subsets):
        masks[number, subset] = True
    workload.truth.parent.mkdir(exist_ok=True)
    stacked = values.reshape(len(subsets), workload.seeds, -1)
    np.savez_compressed(workload.truth, masks=np.packbits(masks, axis=1), values=stacked, n=n)


def retrained(workload: Workload, data: Arrays, jobs: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
    """Return every query's measurement after retraining on each subset from each seed, (jobs, queries) float32."""
    values, began = [], time.monotonic()
    for start in range(0, len(jobs), workload.at_once):
        part = jobs[start : start + workload.at_once]
        states = _trained(workload, data, [subset for subset, _ in part], [seed for _, seed in part])
        values += [measured(workload, state, data) for state in states]
        print(
            f"{workload.name}: {len(values)}/{len(jobs)} in {time.monotonic() - began:.0f} s",
            flush=True,
            file=sys.stderr,
        )
    return np.stack(values).astype(np.float32)


@torch.no_grad()
def measured(workload: Workload, state: dict[str, Tensor], data: Arrays) -> np.ndarray:
    """Return the measurement of every query, (queries,)."""
    module = workload.build()
    module.load_state_dict(state)
    batch = batch_of(data, "query")
    return workload.built_task().measure(module.eval()(batch.inputs), batch, workload.measurement).double().numpy()


def batch_of(data: Arrays, part: str) -> Batch:
    """Return the training set or the queries as one batch."""
    inputs = torch.from_numpy(data[f"{part}_inputs"])
    targets = data.get(f"{part}_targets")
    return Batch(torch.arange(len(inputs)), inputs, None if targets is None else torch.from_numpy(targets))


def _trained(workload: Workload, data: Arrays, subsets: list[np.ndarray], seeds: Any) -> list[dict[str, Tensor]]:
    if workload.architecture["name"] == "logistic":
        return [_optimum(data, subset, workload.recipe.weight_decay) for subset in subsets]
    task, training = workload.built_task(), batch_of(data, "train")
    targets = training.inputs if training.targets is None else training.targets

    def loss(output: Tensor, inputs: Tensor, given: Tensor) -> Tensor:
        return task.loss(output, Batch(torch.arange(0), inputs, given))

    _, stacked = train(workload.build, loss, training.inputs, targets, subsets, list(seeds), workload.recipe)
    return [{name: value[number].clone() for name, value in stacked.items()} for number in range(len(subsets))]


def _optimum(data: Arrays, subset: np.ndarray, l2: float) -> dict[str, Tensor]:
    """Return the multinomial logistic regression of a subset: mean loss + (l2/2)‖θ‖², by L-BFGS in float64."""
    inputs, targets = torch.from_numpy(data["train_inputs"][subset]).double(), torch.from_numpy(data["train_targets"])
    targets = targets[torch.from_numpy(subset)]
    weight = torch.zeros(26, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(26, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, targets)
        loss = loss + l2 / 2 * (weight.square().sum() + bias.square().sum())
        loss.backward()
        return loss

    optimizer.step(closure)
    return {"output.weight": weight.detach().float(), "output.bias": bias.detach().float()}


def _described(workload: Workload) -> dict[str, Any]:
    return {
        "name": workload.name,
        "architecture": workload.architecture,
        "task": {"type": workload.task},
        "measurement": workload.measurement,
        "batch_size": 250,
    }


def main() -> None:
    """Prepare workloads and their truth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(WORKLOADS))
        return
    torch.set_num_threads(arguments.threads)
    for name in arguments.names:
        workload = WORKLOADS[name]
        retrain(workload, prepare(workload))


if __name__ == "__main__":
    main()
