"""Small fitted problems, and the same quantities computed by plain autograd in float64."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from attribution_core.architectures.build import build
from attribution_core.checkpoints import save_checkpoint
from attribution_core.data.batch import Batch
from attribution_core.data.importer import import_dataset
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef, DatasetRef, FitSpec
from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress
from attribution_core.spec import ArchitectureSpec, DatasetSpec

N = 60
MLP = ArchitectureSpec(name="mlp", arguments={"input_dim": 5, "hidden": [6], "output_dim": 3, "activation": "tanh"})
CNN = ArchitectureSpec(name="cnn", arguments={"input_shape": [1, 12, 12], "channels": [3, 4], "num_classes": 3})
SMALL = {"type": "sjlt", "dim": 256, "seed": 3}


@dataclass
class Problem:
    """A data set and trained checkpoints on disk, with what is needed to compute by hand."""

    folder: Path
    spec: FitSpec
    inputs: Tensor
    targets: Tensor

    def with_(self, **changes: Any) -> FitSpec:
        return FitSpec.model_validate({**self.spec.model_dump(), **changes})

    def fit(self, name: str, **changes: Any) -> LoadedIndex:
        spec = self.with_(**changes)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        fit(spec, self.folder / f"{name}-work", self.folder / name, NoProgress())
        return LoadedIndex(self.folder / name, spec)

    def modules(self) -> list[nn.Module]:
        found = []
        for reference in self.spec.checkpoints:
            module = build(self.spec.architecture).double()
            module.load_state_dict({name: value.double() for name, value in load_file(reference.path).items()})
            found.append(module)
        return found

    def queries(self, count: int = 4) -> Batch:
        generator = torch.Generator().manual_seed(99)
        inputs = torch.randn(count, *self.inputs.shape[1:], generator=generator)
        targets = torch.arange(count) % 3 if self.targets.dtype == torch.int64 else torch.zeros(count)
        return Batch(rows=torch.full((count,), -1), inputs=inputs, targets=targets)


def problem(
    folder: Path,
    inputs: Tensor,
    targets: Tensor,
    architecture: ArchitectureSpec,
    *,
    task: str = "classification",
    modules: Sequence[nn.Module],
    measurement: str = "margin",
) -> Problem:
    """Write a data set of tensors and some trained modules to disk."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    source = folder / "train.npz"
    np.savez(source, input=inputs.float().numpy(), target=targets.numpy())
    shape = list(inputs.shape[1:]) if inputs.dim() > 2 else None
    dataset = DatasetSpec(name="train", kind="tensor", shape=shape)
    summary = import_dataset(source, dataset, folder / "data", NoProgress())
    references = []
    for number, module in enumerate(modules):
        path = folder / f"{number}.safetensors"
        save_checkpoint(module.float(), path)
        references.append(
            CheckpointRef(
                id=f"ckpt_{number}",
                path=path,
                sha256=sha256_file(path),
                run="one",
                step=10 * (number + 1),
                learning_rate=0.3 / (number + 1),
            )
        )
    spec = FitSpec.model_validate(
        {
            "architecture": architecture,
            "task": {"type": task},
            "dataset": DatasetRef(
                id="ds", folder=folder / "data", spec=dataset, sha256=summary.sha256, num_examples=len(inputs)
            ),
            "checkpoints": references,
            "method": {"type": "grad_dot", "projection": SMALL},
            "measurement": measurement,
            "store": {"layout": "vectors"},
            "shard_size": 16,
            "batch_size": 8,
        }
    )
    return Problem(folder, spec, inputs.double(), targets)


def classification(folder: Path, checkpoints: int = 1) -> Problem:
    """A three-class problem with a noisy rule and briefly trained networks."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 5, generator=generator)
    targets = (inputs[:, :3] + 0.5 * torch.randn(N, 3, generator=generator)).argmax(1)
    modules = [_trained(MLP, inputs, targets, F.cross_entropy, seed) for seed in range(checkpoints)]
    return problem(folder, inputs, targets, MLP, modules=modules)


def images(folder: Path) -> Problem:
    """Three kinds of small noisy images and a briefly trained convolutional network."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (N,), generator=generator)
    patterns = torch.randn(3, 1, 12, 12, generator=generator)
    inputs = patterns[targets] + torch.randn(N, 1, 12, 12, generator=generator)
    module = _trained(CNN, inputs, targets, F.cross_entropy, 0)
    return problem(folder, inputs, targets, CNN, modules=[module])


def sure(folder: Path) -> Problem:
    """Images, and a network that is sure of most: its last layer's weights are enlarged."""
    given = images(folder)
    (reference,) = given.spec.checkpoints
    weights = load_file(reference.path)
    head = max(name for name, value in weights.items() if value.dim() == 2)
    save_file(weights | {head: 4 * weights[head]}, reference.path)
    changed = reference.model_copy(update={"sha256": sha256_file(reference.path)})
    return Problem(folder, given.with_(checkpoints=[changed]), given.inputs, given.targets)


def regression(folder: Path) -> Problem:
    """A noisy function of five variables."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 5, generator=generator)
    targets = inputs[:, 0] * inputs[:, 1] + 0.3 * torch.randn(N, generator=generator)
    architecture = ArchitectureSpec(name="mlp", arguments={**MLP.arguments, "output_dim": 1})
    module = _trained(
        architecture, inputs, targets, lambda output, target: (output.flatten() - target).square().mean() / 2, 0
    )
    return problem(
        folder, inputs, targets.double(), architecture, task="regression", modules=[module], measurement="prediction"
    )


def _trained(
    architecture: ArchitectureSpec, inputs: Tensor, targets: Tensor, loss: Callable[..., Tensor], seed: int
) -> nn.Module:
    torch.manual_seed(seed)
    module = build(architecture)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(module(inputs), targets).backward()
        optimizer.step()
    return module


def blocks_of(module: nn.Module, scalar: Tensor) -> Tensor:
    """The gradient of a scalar, flattened layer by layer with the bias as last input column: (P,)."""
    parts = []
    for layer in (part for part in module.modules() if isinstance(part, nn.Linear)):
        weight, bias = torch.autograd.grad(scalar, [layer.weight, layer.bias], retain_graph=True)
        parts.append(torch.cat([weight, bias.unsqueeze(1)], dim=1).flatten())
    return torch.cat(parts)


def gradients(module: nn.Module, batch: Batch, objective: Callable[[Tensor, Batch], Tensor]) -> Tensor:
    """Per-example gradients by a loop over examples, (batch, P) float64."""
    double = Batch(batch.rows, batch.inputs.double(), batch.targets)
    return torch.stack(
        [
            blocks_of(module, objective(double[i : i + 1].forward(module), double[i : i + 1]).sum())
            for i in range(len(batch))
        ]
    )


def training_batch(given: Problem) -> Batch:
    return Batch(torch.arange(len(given.inputs)), given.inputs, given.targets)


def tempered(misfits: Tensor, power: float) -> Tensor:
    """Return a power of all examples' misfits that has their mean."""
    return misfits**power * misfits.mean() / (misfits**power).mean()


def shortfall(problem: Problem) -> np.ndarray:
    """Return `1 - p` of every training example."""
    batch = training_batch(problem)
    with torch.no_grad():
        probabilities = problem.modules()[0](batch.inputs.double()).softmax(1)
    return (1 - probabilities[torch.arange(len(batch)), batch.targets]).numpy()


def relative_error(found: np.ndarray | Tensor, expected: np.ndarray | Tensor) -> float:
    """Largest difference as a share of the largest expected magnitude."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())
