"""Optimizer steps as pure functions of tensors by name: nothing changes in place, and everything can be differentiated.

They act element by element, so the same functions step one model and, with a leading dimension, many.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from attribution_core.training.recipe import Adam, AdamW, Recipe, Sgd

Tensors = dict[str, Tensor]
_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ has it too


class Optimizer(ABC):
    """The part of a recipe that turns gradients into steps.

    Attributes:
        moments: names of the tensors that the state keeps for each parameter.
    """

    moments: tuple[str, ...]

    def __init__(self, weight_decay: float) -> None:
        self.weight_decay = weight_decay

    def init_state(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """Return the state before the first step: zeros, under `<moment>.<parameter>`."""
        return {
            f"{moment}.{name}": torch.zeros_like(value) for moment in self.moments for name, value in parameters.items()
        }

    def update(
        self, parameters: Tensors, state: Tensors, gradients: Tensors, learning_rate: float, step: int
    ) -> tuple[Tensors, Tensors]:
        """Return parameters and state after a step, each in the order it came in; `step` counts from 0."""
        stepped: Tensors = {}
        following: Tensors = {}
        for name, value in parameters.items():
            old = [state[f"{moment}.{name}"] for moment in self.moments]
            stepped[name], new = self._step(value, old, gradients[name], learning_rate, step)
            following.update({f"{moment}.{name}": part for moment, part in zip(self.moments, new, strict=True)})
        # A derivative is pulled back only to a tree of the same order, and a state that was read from a file is sorted by name.
        return stepped, {name: following[name] for name in state}

    @abstractmethod
    def _step(
        self, value: Tensor, moments: list[Tensor], gradient: Tensor, learning_rate: float, step: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Step one parameter."""

    def _penalised(self, value: Tensor, gradient: Tensor) -> Tensor:
        return gradient if self.weight_decay == 0 else gradient.add(value, alpha=self.weight_decay)


class SgdSteps(Optimizer):
    """Stochastic gradient descent; the first momentum is the first gradient, as in torch."""

    def __init__(self, spec: Sgd, weight_decay: float) -> None:
        super().__init__(weight_decay)
        self.momentum, self.nesterov = spec.momentum, spec.nesterov
        self.moments = ("momentum",) if spec.momentum else ()

    def _step(
        self, value: Tensor, moments: list[Tensor], gradient: Tensor, learning_rate: float, step: int
    ) -> tuple[Tensor, list[Tensor]]:
        change = self._penalised(value, gradient)
        if not moments:
            return value.sub(change, alpha=learning_rate), []
        momentum = change.add(moments[0], alpha=self.momentum)
        change = change.add(momentum, alpha=self.momentum) if self.nesterov else momentum
        return value.sub(change, alpha=learning_rate), [momentum]


class AdamSteps(Optimizer):
    """Adam, and AdamW where the weight decay is decoupled."""

    moments = ("mean", "square")

    def __init__(self, spec: Adam | AdamW, weight_decay: float) -> None:
        super().__init__(weight_decay)
        self.betas, self.eps = spec.betas, spec.eps
        self.decoupled = isinstance(spec, AdamW)

    def _step(
        self, value: Tensor, moments: list[Tensor], gradient: Tensor, learning_rate: float, step: int
    ) -> tuple[Tensor, list[Tensor]]:
        if self.decoupled:
            value = value * (1 - learning_rate * self.weight_decay)
        else:
            gradient = self._penalised(value, gradient)
        first, second = self.betas
        mean = moments[0].lerp(gradient, 1 - first)
        square = (moments[1] * second).add(gradient.square(), alpha=1 - second)
        root = _root(square) / (1 - second ** (step + 1)) ** 0.5
        rate = learning_rate / (1 - first ** (step + 1))
        return value.sub(mean / (root + self.eps), alpha=rate), [mean, square]


def build_optimizer(recipe: Recipe) -> Optimizer:
    """Return the steps a recipe asks for."""
    match recipe.optimizer:
        case Sgd():
            return SgdSteps(recipe.optimizer, recipe.weight_decay)
        case Adam() | AdamW():
            return AdamSteps(recipe.optimizer, recipe.weight_decay)


def clipped(gradients: Tensors, largest: float) -> Tensors:
    """Return one model's gradients, scaled down together where their norm is longer than `largest`."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in gradients.values()]))
    scale = (largest / (norm + _CLIP_EPS)).clamp(max=1.0)
    return {name: part * scale for name, part in gradients.items()}


def _root(square: Tensor) -> Tensor:
    """Return the square root, whose derivative at 0 is taken as 0: a weight that never had a gradient has no influence."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
