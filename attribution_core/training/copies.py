"""The short training of a perturbed copy: noise makes it another network, and a few passes over the training set teach it the same data."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from attribution_core.errors import InvalidInputError
from attribution_core.method_spec import CopyTraining
from attribution_core.perturbation import root_mean_square
from attribution_core.progress import Progress
from attribution_core.tasks import Task
from attribution_core.training.data import TrainingData
from attribution_core.training.optimizers import AdamSteps
from attribution_core.training.recipe import Adam

# A copy takes tens of steps: squares are averaged over as many.
_ADAM = Adam(betas=(0.9, 0.99), eps=1e-12)


def train_copy(
    module: nn.Module, task: Task, data: TrainingData, training: CopyTraining, seed: int, progress: Progress
) -> None:
    """Train a network in place by Adam, whose steps are multiples of each parameter tensor's size, so that no scale has to be known.

    The module stays as it is evaluated: without dropout, and with the statistics that its normalisation layers have.

    Args:
        module: the noisy copy.
        task: has the loss.
        data: the training set.
        training: for how long, and how far.
        seed: of the examples' order.
        progress: counts every example once, whatever the number of epochs.

    Raises:
        InvalidInputError: if the weights end up not finite.
        Cancelled: if the work should stop; it is asked at every step.
    """
    parameters = {name: value.requires_grad_(True) for name, value in module.named_parameters()}
    sizes = {name: root_mean_square(value.detach()) for name, value in parameters.items()}
    optimizer = AdamSteps(_ADAM, weight_decay=0.0)
    states = {name: optimizer.init_state({name: value.detach()}) for name, value in parameters.items()}
    examples = len(data.rows)
    steps, done = training.epochs * -(-examples // training.batch_size), 0
    for step, rows in enumerate(_batches(data.rows, training, seed)):
        batch = data.batch(rows)
        loss = task.loss(batch.forward(module), batch).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        rate = training.step * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
                moved, states[name] = optimizer.update(
                    {name: value}, states[name], {name: gradient}, rate * sizes[name], step
                )
                value.copy_(moved[name])
        progress.advance((step + 1) * examples // steps - done)
        done = (step + 1) * examples // steps
    if not all(bool(value.isfinite().all()) for value in parameters.values()):
        raise InvalidInputError(
            "training a perturbed copy led to weights that are not finite: take a smaller step",
            "/method/perturbation/training/step",
        )


def _batches(rows: np.ndarray, training: CopyTraining, seed: int) -> Iterator[np.ndarray]:
    """Yield the rows of every step; each epoch has every example once, in an order of its own."""
    generator = np.random.default_rng(seed)
    for _ in range(training.epochs):
        order = generator.permutation(rows)
        for start in range(0, len(order), training.batch_size):
            yield order[start : start + training.batch_size]
