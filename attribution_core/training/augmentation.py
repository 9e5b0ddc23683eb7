"""Random changes of images that depend on the run's seed, the step and the row alone, so that a run can be replayed."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.tasks.base import uniforms
from attribution_core.training.recipe import Recipe


def augmented(batch: Batch, recipe: Recipe, seed: int, step: int) -> Batch:
    """Return the batch of a step as its run sees it.

    Raises:
        InvalidInputError: if the recipe augments what is not an image, (batch, channels, height, width).
    """
    if recipe.augmentation == "none":
        return batch
    if batch.inputs.dim() != 4:
        raise InvalidInputError(f"{recipe.augmentation} is for images", "/recipe/augmentation")
    draws = uniforms(seed, step, batch.rows, 2)  # (batch, 2) in [0, 1)
    if recipe.augmentation == "horizontal_flip":
        flip = (draws[:, 0] < 0.5).view(-1, 1, 1, 1)
        return replace(batch, inputs=torch.where(flip, batch.inputs.flip(-1), batch.inputs))
    return replace(batch, inputs=_shifted(batch.inputs, (draws * (2 * recipe.max_shift + 1)).long(), recipe.max_shift))


def _shifted(images: Tensor, offsets: Tensor, largest: int) -> Tensor:
    """Return windows of the images (batch, C, H, W) in a frame of zeros, beginning at offsets (batch, 2) in 0 … 2·largest."""
    number, _, height, width = images.shape
    framed = F.pad(images, (largest,) * 4)
    down = offsets[:, :1] + torch.arange(height, device=images.device)  # (batch, H)
    right = offsets[:, 1:] + torch.arange(width, device=images.device)  # (batch, W)
    example = torch.arange(number, device=images.device).view(-1, 1, 1)
    return framed[example, :, down.unsqueeze(2), right.unsqueeze(1)].permute(0, 3, 1, 2)
