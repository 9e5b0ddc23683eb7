"""What all peers are given and how they are measured: same checkpoints, same data, one thread, CPU seconds, peak memory."""

import argparse
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attribution_core.checkpoints import load_model
from attribution_core.data.batch import Batch
from attribution_core.spec import ArchitectureSpec
from benchmarks.cost import damping_name, damping_of, peak_megabytes, plain_passes
from benchmarks.workloads import WORKLOADS, Workload, batch_of, prepare

BATCH = 250


class Problem:
    """A workload as plain torch modules, datasets and functions; a batch is a pair (inputs, targets), for language models (tokens, tokens)."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.data = prepare(workload)
        self.task = workload.built_task()
        self.train, self.query = (self._dataset(part) for part in ("train", "query"))

    @property
    def is_language_model(self) -> bool:
        """Whether inputs are token sequences."""
        return self.workload.task == "causal_lm"

    def path(self, number: int) -> Path:
        """Return where a checkpoint is."""
        return self.workload.folder / "checkpoints" / f"{number}.safetensors"

    def module(self, number: int) -> nn.Module:
        """Return a checkpoint in eval mode whose parameters need gradients."""
        module = load_model(ArchitectureSpec(**self.workload.architecture), self.path(number), "cpu")
        return module.requires_grad_()

    def loader(self, part: str, batch: int = BATCH) -> DataLoader:
        """Return batches in order."""
        return DataLoader(self.train if part == "train" else self.query, batch_size=batch, shuffle=False)

    def batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        """Return a batch as the task takes it."""
        return Batch(torch.arange(len(inputs)), inputs, None if self.is_language_model else targets)

    def loss(self, output: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the training loss of every example, (batch,)."""
        return self.task.loss(output, self.batch(inputs, targets))

    def measure(self, output: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the measurement of every example, (batch,)."""
        return self.task.measure(output, self.batch(inputs, targets), self.workload.measurement)

    def log_odds(self, output: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return TRAK's model output of every example, (batch,)."""
        return self.task.log_odds(output, self.batch(inputs, targets))

    def sampled_loss(self, output: Tensor) -> Tensor:
        """Return the loss of every example for labels drawn from the model, (batch,)."""
        logits = output[:, :-1] if self.is_language_model else output[:, None]
        flat = logits.flatten(0, 1)
        labels = torch.multinomial(flat.detach().softmax(1), 1).flatten()
        losses = nn.functional.cross_entropy(flat, labels, reduction="none").view(logits.shape[:2])
        return losses.mean(1)

    def _dataset(self, part: str) -> TensorDataset:
        whole = batch_of(self.data, part)
        return TensorDataset(whole.inputs, whole.inputs if whole.targets is None else whole.targets)


class Peer(ABC):
    """One method of a peer."""

    def __init__(self, problem: Problem, checkpoints: Sequence[int], folder: Path, options: dict[str, Any]) -> None:
        self.problem, self.checkpoints, self.folder, self.options = problem, list(checkpoints), folder, options

    @classmethod
    def ensembles(cls, options: dict[str, Any]) -> bool:
        """Whether it takes several checkpoints itself; scores of the others are averaged by hand."""
        return False

    @abstractmethod
    def fit(self) -> None:
        """Compute all that does not depend on queries or damping."""

    def prepare(self, damping: float | None) -> None:  # noqa: B027
        """Compute what depends on the damping but on no query; nothing by default."""

    @abstractmethod
    def scores(self, damping: float | None) -> np.ndarray:
        """Return (queries, n) scores of all pairs, positive where an example raises the measurement; None is the peer's default damping."""

    def bytes_per_example(self) -> float | None:
        """Return what is stored per training example, None if nothing is."""
        return None


def run(kind: type[Peer], name: str) -> None:
    """Measure a peer on a workload from the command line."""
    arguments = parsed()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    problem = Problem(WORKLOADS[arguments.workload])
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = range(arguments.checkpoints)
    groups = [list(numbers)] if kind.ensembles(arguments.method) else [[number] for number in numbers]
    peers = [
        kind(problem, group, arguments.out / f"work{place}", arguments.method) for place, group in enumerate(groups)
    ]
    features = queries = 0.0
    for place, damping in enumerate(arguments.damping):
        total, clock = None, Clock()
        for peer in peers:
            if place == 0:
                with clock.timed("features"):
                    peer.fit()
            with clock.timed("features" if place == 0 else "again"):
                peer.prepare(damping)
            with clock.timed("queries"):
                scores = peer.scores(damping)
            total = scores if total is None else total + scores
        assert total is not None
        np.save(arguments.out / f"scores-{damping_name(damping)}.npy", (total / len(peers)).astype(np.float32))
        if place == 0:
            features, queries = clock.seconds["features"], clock.seconds["queries"]
    peak = peak_megabytes()
    plain = plain_passes(problem.workload, problem.data)
    cost = {
        "peer": name,
        "method": arguments.method,
        "checkpoints": arguments.checkpoints,
        "feature_seconds": features,
        "query_seconds": queries,
        "plain_train": plain.train,
        "plain_query": plain.query,
        "peak_memory_mb": peak,
        "bytes_per_example": peers[0].bytes_per_example(),
    }
    (arguments.out / "cost.json").write_text(json.dumps(cost, indent=1))


class Clock:
    """CPU seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what the block takes."""
        began = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began


def parsed() -> argparse.Namespace:
    """Parse the command line that all peers share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True, choices=WORKLOADS)
    parser.add_argument("--method", type=json.loads, required=True)
    parser.add_argument("--checkpoints", type=int, default=1)
    parser.add_argument("--damping", type=damping_of, nargs="*", default=[None])
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def functional(problem: Problem, module: nn.Module, value: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the mean of `value(output, inputs, targets)` over a batch, or one example, as a function of (parameters, batch) in torch.func's style."""
    dims = problem.train.tensors[0].dim()

    def of(parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch if batch[0].dim() == dims else (part.unsqueeze(0) for part in batch)
        return value(torch.func.functional_call(module, parameters, (inputs,)), inputs, targets).mean()

    return of
