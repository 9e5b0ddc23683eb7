"""Named arrays on disk as safetensors: written whole or not at all, with bytes that depend on nothing but the values."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from attribution_core.errors import CorruptArtifactError


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file durably: under a temporary name first, so that `path` is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return a file's arrays.

    Raises:
        CorruptArtifactError: if it is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptArtifactError(f"{path.name} cannot be read: {error}") from error
