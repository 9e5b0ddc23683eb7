"""What everything is measured against: one plain forward and backward pass, and the process's peak memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from attribution_core.checkpoints import load_model
from attribution_core.data.batch import Batch
from attribution_core.spec import ArchitectureSpec
from benchmarks.workloads import Workload, batch_of

_REPEATS = 5
_BATCH = 250


@dataclass(frozen=True)
class Plain:
    """CPU seconds of one forward and backward pass with parameter gradients over the training set and the queries."""

    train: float
    query: float


def plain_passes(workload: Workload, data: dict[str, np.ndarray]) -> Plain:
    """Measure the passes in this process, the fastest of a few."""
    path = workload.folder / "checkpoints" / "0.safetensors"
    module = load_model(ArchitectureSpec(**workload.architecture), path, "cpu")
    parameters = [parameter.requires_grad_() for parameter in module.parameters()]
    task = workload.built_task()

    def passes(part: str) -> float:
        whole = batch_of(data, part)

        def once() -> None:
            for start in range(0, len(whole), _BATCH):
                batch: Batch = whole[start : start + _BATCH]
                torch.autograd.grad(task.loss(module(batch.inputs), batch).sum(), parameters)

        return fastest(once)

    return Plain(passes("train"), passes("query"))


def fastest(function: Callable[[], None]) -> float:
    """Return the smallest CPU seconds of a few calls."""
    seconds = []
    for _ in range(_REPEATS):
        began = time.process_time()
        function()
        seconds.append(time.process_time() - began)
    return min(seconds)


def peak_megabytes() -> float:
    """Return the largest resident size of this process so far."""
    with open("/proc/self/status") as file:  # noqa: PTH123
        (line,) = [line for line in file if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def damping_of(text: str) -> float | None:
    """Read a damping from the command line; `default` is the method's own, None."""
    return None if text == "default" else float(text)


def damping_name(damping: float | None) -> str:
    """Return a damping as file names and tables have it."""
    return "default" if damping is None else f"{damping:g}"
