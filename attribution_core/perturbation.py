"""Perturbed copies of a checkpoint: an ensemble where only one training is at hand.

What a score says beyond one network's accidents, noise on its weights leaves; the accidents, which no other training would share, average out.
"""

import numpy as np
import torch
from torch import Tensor, nn

from attribution_core.fingerprint import sha256_of
from attribution_core.method_spec import Perturbation
from attribution_core.random_numbers import normal

_NUMBERS_AT_ONCE = 1 << 22


def seed_of(perturbation: Perturbation, weights: str, copy: int) -> int:
    """Return what decides one copy's random numbers; its own wherever its checkpoint stands among others."""
    return int(sha256_of([perturbation.seed, weights, copy])[:16], 16)


def root_mean_square(tensor: Tensor) -> float:
    """Return the root of the mean square of a tensor's numbers, whatever its shape, summed in float64."""
    return float(tensor.double().square().mean().sqrt())


@torch.no_grad()
def perturb(module: nn.Module, perturbation: Perturbation, weights: str, copy: int) -> None:
    """Put noise on every parameter, in place: `w ← (w + σ r ε) / √(1 + σ²)`, r being the root mean square of w's tensor.

    The root keeps each tensor's expected square: noise alone would enlarge every layer's outputs, and make the network surer than it is.
    Vectors of copies that are trained stay as they are: biases and gains are not drawn at random where a training begins, either.

    Args:
        module: the checkpoint's network.
        perturbation: σ and the seed.
        weights: the checkpoint's sha256, so that its copies are the same wherever it stands among others.
        copy: which one, from 1.
    """
    seed = seed_of(perturbation, weights, copy)
    sigma, start = perturbation.noise, 0
    for parameter in module.parameters():
        if perturbation.training is not None and parameter.ndim < 2:
            continue
        scale = sigma * root_mean_square(parameter)
        flat = parameter.view(-1)
        for first in range(0, len(flat), _NUMBERS_AT_ONCE):
            part = flat[first : first + _NUMBERS_AT_ONCE]
            noise = torch.from_numpy(normal(seed, np.arange(start + first, start + first + len(part))))
            part.add_(noise.to(part), alpha=scale).div_((1 + sigma**2) ** 0.5)
        start += len(flat)
