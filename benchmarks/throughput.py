"""How much faster many retrainings run as one batched program than one at a time by plain torch: `python -m benchmarks.throughput`.

The workload mnist-mlp on 1,000 examples, halves of it as in a bank. Both are timed by wall clock in turns, and the medians compared.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from attribution_core.data.importer import import_dataset
from attribution_core.fit_spec import DatasetRef
from attribution_core.processor import set_up_processor
from attribution_core.progress import NoProgress
from attribution_core.spec import DatasetSpec
from attribution_core.training.bank import group_runs
from attribution_core.training.spec import Protocol, TrainSpec
from attribution_core.training.trainer import Run, Trainer
from benchmarks.workloads import WORKLOADS, Workload


def trainer_of(workload: Workload, folder: Path, epochs: int) -> Trainer:
    """Return a trainer of a classification workload whose data is written to a folder."""
    data = workload.data()
    source = folder / "train.npz"
    np.savez(source, input=data["train_inputs"], target=data["train_targets"])
    dataset = DatasetSpec(name="train", kind="tensor", shape=list(data["train_inputs"].shape[1:]))
    (folder / "data").mkdir()
    summary = import_dataset(source, dataset, folder / "data", NoProgress())
    recipe = {
        "optimizer": {"type": "sgd", "momentum": 0.9, "nesterov": True},
        "learning_rate": workload.recipe.learning_rate,
        "schedule": {"type": "cosine", "warmup_fraction": 0.1},
        "weight_decay": workload.recipe.weight_decay,
        "epochs": epochs,
        "batch_size": workload.recipe.batch_size,
    }
    reference = DatasetRef(
        id=workload.name,
        folder=folder / "data",
        spec=dataset,
        sha256=summary.sha256,
        num_examples=len(data["train_targets"]),
    )
    return Trainer(
        TrainSpec.model_validate(
            {
                "architecture": workload.architecture,
                "task": {"type": workload.task},
                "dataset": reference,
                "recipe": recipe,
            }
        )
    )


def alone(trainer: Trainer, runs: list[Run]) -> float:
    """Return the seconds per retraining with plain torch: a module, backward, torch's optimizer, one run after the other."""
    began = time.perf_counter()
    for run in runs:
        module = trainer.network.loaded(trainer.initial(run)).requires_grad_(True)
        decay = trainer.recipe.weight_decay
        optimizer = torch.optim.SGD(module.parameters(), momentum=0.9, nesterov=True, weight_decay=decay)
        for step in trainer.plan(run, "resample"):
            optimizer.param_groups[0]["lr"] = step.learning_rate
            batch = trainer.data.batch(step.rows)
            optimizer.zero_grad()
            trainer.network.task.loss(batch.forward(module), batch).mean().backward()
            optimizer.step()
    return (time.perf_counter() - began) / len(runs)


def together(trainer: Trainer, runs: list[Run]) -> float:
    """Return the seconds per retraining as one batched program."""
    began = time.perf_counter()
    trainer.train(runs)
    return (time.perf_counter() - began) / len(runs)


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="mnist-mlp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    set_up_processor(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(WORKLOADS[arguments.workload], Path(folder), arguments.epochs)
        runs = group_runs(Protocol(subsets=1), len(trainer.data), 0, trainer.network.num_parameters)
        together(trainer, runs[:2])
        rounds = [(alone(trainer, runs[:4]), together(trainer, runs)) for _ in range(arguments.rounds)]
    apart, joined = np.median(rounds, axis=0)
    print(f"{arguments.workload}, {arguments.threads} threads, {len(runs)} models at once, {arguments.epochs} epochs")
    print(f"one at a time {apart * 1e3:.1f} ms each, together {joined * 1e3:.1f} ms each: {apart / joined:.2f} ×")


if __name__ == "__main__":
    main()
