"""The short training of a perturbed copy: noise makes it another network, and a few passes over the training set teach it the same data."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from attribution_core.errors import NotFiniteError
from attribution_core.method_spec import CopyTraining
from attribution_core.perturbation import root_mean_square
from attribution_core.progress import Progress
from attribution_core.tasks import Task
from attribution_core.training.data import TrainingData

# Of the averages of gradients and of their squares: a copy takes tens of steps.
_DECAYS = (0.9, 0.99)


def train_copy(
    module: nn.Module, task: Task, data: TrainingData, training: CopyTraining, seed: int, progress: Progress
) -> None:
    """Train a network in place, by steps that are relative to each parameter tensor's size and to its gradients', so that no scale has to be known.

    `w ← w - η r m / √v`: r is the root mean square of w's tensor at the start, m the mean of its gradients (decay 0.9) and v that of their mean
    squares (0.99), one number per tensor, as in Adam-mini (Zhang et al. 2024). Without biases from their start, as in Adam. The module stays as it is
    evaluated: without dropout, and with the statistics that its normalisation layers have.

    Args:
        module: the noisy copy.
        task: has the loss.
        data: the training set.
        training: for how long, and how far.
        seed: of the examples' order.
        progress: counts every example once, whatever the number of epochs.

    Raises:
        NotFiniteError: if the weights end up not finite.
        Cancelled: if the work should stop; it is asked at every step.
    """
    parameters = [value.requires_grad_(True) for value in module.parameters()]
    moving = [_Moving(value.detach()) for value in parameters]
    examples = len(data.rows)
    steps, done = training.epochs * -(-examples // training.batch_size), 0
    for step, rows in enumerate(_batches(data.rows, training, seed)):
        batch = data.batch(rows)
        loss = task.loss(batch.forward(module), batch).mean()
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        rate = training.step * 0.5 * (1 + math.cos(math.pi * step / steps))
        for each, gradient in zip(moving, gradients, strict=True):
            each.step(gradient, rate)
        progress.advance((step + 1) * examples // steps - done)
        done = (step + 1) * examples // steps
    if not all(bool(value.isfinite().all()) for value in parameters):
        raise NotFiniteError(
            "training a perturbed copy led to weights that are not finite: take a smaller step",
            "/method/perturbation/training/step",
        )


class _Moving:
    """One parameter tensor and what its steps have seen; values change in place."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._size = value, root_mean_square(value)
        self._mean, self._square = torch.zeros_like(value), 0.0
        self._weights = [0.0, 0.0]  # that the averages have given to gradients so far, which grow to 1

    def step(self, gradient: Tensor, rate: float) -> None:
        """Move against the mean of the gradients, of the value's shape: by `rate` times its size, were they all alike."""
        first, second = self._weights = [
            decay * weight + 1 - decay for decay, weight in zip(_DECAYS, self._weights, strict=True)
        ]
        self._mean.lerp_(gradient, 1 - _DECAYS[0])
        self._square += (1 - _DECAYS[1]) * (float(gradient.square().mean()) - self._square)
        root = (self._square / second) ** 0.5
        if root != 0:  # one that is not finite is seen in the weights
            self._value.sub_(self._mean, alpha=rate * self._size / (first * root))


def _batches(rows: np.ndarray, training: CopyTraining, seed: int) -> Iterator[np.ndarray]:
    """Yield the rows of every step; each epoch has every example once, in an order of its own."""
    generator = np.random.default_rng(seed)
    for _ in range(training.epochs):
        order = generator.permutation(rows)
        for start in range(0, len(order), training.batch_size):
            yield order[start : start + training.batch_size]
