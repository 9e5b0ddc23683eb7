"""Weights of a model: loaded strictly from safetensors, saved the same way."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from attribution_core.architectures.build import build
from attribution_core.errors import CheckpointError
from attribution_core.spec import ArchitectureSpec


def load_model(
    spec: ArchitectureSpec, path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return the model with the file's weights, in eval mode, with parameters that need no gradient.

    Raises:
        CheckpointError: if the file is not readable, or its names or shapes do not fit.
    """
    module = build(spec)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the weights cannot be read: {error}") from error
    try:
        incompatible = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit: {error}") from error
    # Integer buffers (a batch counter) are no weights; a tied weight may be stored under one of its names.
    missing = [name for name in incompatible.missing_keys if not _dispensable(module, name, weights)]
    if missing or incompatible.unexpected_keys:
        raise CheckpointError(f"the weights lack {missing} and have unknown {incompatible.unexpected_keys}")
    return module.to(device=device, dtype=dtype).eval().requires_grad_(False)


def save_checkpoint(module: nn.Module, path: Path) -> None:
    """Write a module's weights as safetensors; a tied weight is written under each of its names.

    Raises:
        OSError: if they cannot be written. (The library, writing a file itself, would not say why.)
    """
    path.write_bytes(save({name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}))


def _dispensable(module: nn.Module, name: str, weights: dict[str, torch.Tensor]) -> bool:
    state = module.state_dict(keep_vars=True)
    if not state[name].is_floating_point():
        return True
    return any(other is state[name] and key in weights for key, other in state.items() if key != name)
