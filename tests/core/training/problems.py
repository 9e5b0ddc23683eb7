"""Small training problems on disk, of every kind of architecture, and plain training with torch's own optimizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution_core.data.batch import Batch
from attribution_core.data.importer import import_dataset
from attribution_core.fit_spec import DatasetRef
from attribution_core.progress import NoProgress
from attribution_core.spec import DatasetSpec
from attribution_core.training.spec import TrainSpec
from attribution_core.training.trainer import Run, Step, Trainer

N = 22
MLP = {"name": "mlp", "arguments": {"input_dim": 5, "hidden": [6], "output_dim": 3, "activation": "tanh"}}
CNN = {"name": "cnn", "arguments": {"input_shape": [1, 6, 6], "channels": [3], "num_classes": 3, "activation": "gelu"}}
LM = {
    "name": "transformer_lm",
    "arguments": {"vocab_size": 7, "max_length": 6, "width": 8, "depth": 1, "heads": 2, "tied": True},
}
SGD = {
    "optimizer": {"type": "sgd", "momentum": 0.9, "nesterov": True},
    "learning_rate": 0.1,
    "epochs": 3,
    "batch_size": 5,
}


def spec_of(folder: Path, kind: str = "mlp", impossible: int | None = None, **recipe: Any) -> TrainSpec:
    """A data set of N examples for an architecture, of which one may be none that it can learn, written to a folder, and a recipe over it."""
    generator = np.random.default_rng(0)
    task: dict[str, Any] = {"type": "classification"}
    source = folder / "train.npz"
    if kind == "lm":
        task, source = {"type": "causal_lm"}, folder / "train.jsonl"
        rows = [generator.integers(0, 7, 2 + number % 5).tolist() for number in range(N)]
        if impossible is not None:
            rows[impossible] = rows[impossible][:1]
        source.write_text("".join(f'{{"input": {tokens}}}\n' for tokens in rows))
        dataset = DatasetSpec(name="train", kind="tokens", target=None)
    else:
        shape = (N, 5) if kind == "mlp" else (N, 1, 6, 6)
        inputs = generator.standard_normal(shape).astype(np.float32)
        targets = generator.integers(0, 3, N)
        if impossible is not None:
            targets[impossible] = 7
        np.savez(source, input=inputs, target=targets)
        dataset = DatasetSpec(name="train", kind="tensor", shape=None if kind == "mlp" else [1, 6, 6])
    summary = import_dataset(source, dataset, folder / "data", NoProgress())
    return TrainSpec.model_validate(
        {
            "architecture": {"mlp": MLP, "cnn": CNN, "lm": LM}[kind],
            "task": task,
            "dataset": DatasetRef(id="ds", folder=folder / "data", spec=dataset, sha256=summary.sha256, num_examples=N),
            "recipe": {**SGD, **recipe},
        }
    )


def everything(seed: int = 0) -> Run:
    return Run(np.ones(N, bool), seed)


def halves(count: int, seed: int = 0) -> list[Run]:
    """Runs on different halves, with different seeds."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, N), bool)
    for mask in masks:
        mask[generator.permutation(N)[: N // 2]] = True
    return [Run(mask, number) for number, mask in enumerate(masks)]


def by_torch(
    trainer: Trainer,
    run: Run,
    plan: Sequence[Step],
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip: float | None = None,
) -> dict[str, Tensor]:
    """Train a module on the plan's rows by the book: mean loss, backward, clip, step."""
    for step in plan:
        batch: Batch = trainer.data.batch(step.rows)
        optimizer.zero_grad()
        trainer.network.task.loss(batch.forward(module), batch).mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {name: value.detach() for name, value in module.named_parameters()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference, as a share of the largest expected magnitude."""
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)
