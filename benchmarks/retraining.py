"""Real retraining of many small models at once, as one batched program over stacked parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a workload's models are trained: SGD with Nesterov momentum or AdamW, one-cycle schedule, mean loss per batch.

    Attributes:
        weight_decay: added to the gradient (`sgd`: L2 in the loss) or decoupled (`adamw`).
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    epochs: int
    batch_size: int


def train(
    build: Callable[[], nn.Module],
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    recipe: Recipe,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train one model per (subset, seed) pair and return the module with the stacked parameters.

    Args:
        build: returns a freshly initialised network, after the seed was set.
        loss: per-example loss (batch,) of (output, inputs, targets).
        inputs: all training inputs.
        targets: all training targets.
        subsets: row numbers of each model's training set, all of one size.
        seeds: each fixes initialisation and order of its model.
        recipe: how to train.
    """
    modules = []
    for seed in seeds:
        torch.manual_seed(seed)
        modules.append(build())
    base = modules[0]
    parameters, _ = stack_module_state(modules)
    parameters = {name: value.detach().clone() for name, value in parameters.items()}
    rows = torch.stack([torch.from_numpy(np.asarray(subset)) for subset in subsets])  # (models, size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(base, weights, (x,)), x, y).mean()

    gradient = vmap(grad(one))
    step_of = _sgd(parameters, recipe) if recipe.optimizer == "sgd" else _adamw(parameters, recipe)
    steps = recipe.epochs * -(-rows.shape[1] // recipe.batch_size)
    step = 0
    for _ in range(recipe.epochs):
        order = torch.stack([torch.randperm(rows.shape[1], generator=generator) for generator in generators])
        shuffled = rows.gather(1, order)
        for batch in shuffled.split(recipe.batch_size, dim=1):
            gradients = gradient(parameters, inputs[batch], targets[batch])
            step_of(parameters, gradients, recipe.learning_rate * _one_cycle(step / steps))
            step += 1
    return base, parameters


@torch.no_grad()
def outputs(module: nn.Module, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Return the outputs of every stacked model, (models, batch, …)."""
    return vmap(lambda weights: functional_call(module, weights, (inputs,)))(parameters)


def _one_cycle(progress: float) -> float:
    """Rise linearly over the first tenth, then fall along a cosine."""
    if progress < 0.1:
        return max(progress / 0.1, 0.02)
    return float(0.5 * (1 + np.cos(np.pi * (progress - 0.1) / 0.9)))


def _sgd(parameters: dict[str, Tensor], recipe: Recipe) -> Callable[..., None]:
    momentum = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def step(weights: dict[str, Tensor], gradients: dict[str, Tensor], rate: float) -> None:
        for name, value in weights.items():
            change = gradients[name] + recipe.weight_decay * value
            momentum[name].mul_(0.9).add_(change)
            value.sub_(rate * (change + 0.9 * momentum[name]))

    return step


def _adamw(parameters: dict[str, Tensor], recipe: Recipe) -> Callable[..., None]:
    first = {name: torch.zeros_like(value) for name, value in parameters.items()}
    second = {name: torch.zeros_like(value) for name, value in parameters.items()}
    count = 0

    def step(weights: dict[str, Tensor], gradients: dict[str, Tensor], rate: float) -> None:
        nonlocal count
        count += 1
        for name, value in weights.items():
            first[name].lerp_(gradients[name], 0.1)
            second[name].lerp_(gradients[name].square(), 0.02)
            mean, variance = first[name] / (1 - 0.9**count), second[name] / (1 - 0.98**count)
            value.mul_(1 - rate * recipe.weight_decay).sub_(rate * mean / (variance.sqrt() + 1e-6))

    return step
