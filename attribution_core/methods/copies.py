"""The first stage of a fit whose perturbed copies are trained: their weights, which the index keeps with its fitted arrays."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from attribution_core.methods.fitted import COPY_WEIGHTS
from attribution_core.perturbation import seed_of
from attribution_core.progress import Progress
from attribution_core.training.copies import train_copy
from attribution_core.training.data import TrainingData

if TYPE_CHECKING:
    from attribution_core.methods.context import FitContext


def trained_weights(context: "FitContext", number: int, progress: Progress) -> dict[str, np.ndarray]:
    """Return a copy's weights after its training, under `weights.<parameter>`, float32 of the parameter's shape; nothing for a checkpoint itself.

    Raises:
        InvalidInputError: if the data does not fit the model, or the training diverges.
        Cancelled: if the work should stop.
    """
    member, perturbation = context.spec.members[number], context.spec.perturbation
    if member.copy == 0:
        progress.advance(context.spec.num_training)
        return {}
    assert perturbation is not None
    assert perturbation.training is not None
    data = TrainingData(context.source, context.training_rows)
    data.check(context.task, context.checkpoint(0).output(data.batch(data.rows[:1])))
    module = context.noisy(member)
    seed = seed_of(perturbation, member.checkpoint.sha256, member.copy)
    train_copy(module, context.task, data, perturbation.training, seed, progress)
    return {f"{COPY_WEIGHTS}.{name}": value.detach().cpu().numpy() for name, value in module.named_parameters()}


@torch.no_grad()
def put_weights(module: nn.Module, own: Mapping[str, np.ndarray]) -> None:
    """Give a module, in place, the weights that `trained_weights` returned for a copy of it."""
    for name, value in module.named_parameters():
        value.copy_(torch.from_numpy(own[f"{COPY_WEIGHTS}.{name}"]))
