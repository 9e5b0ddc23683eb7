"""Named arrays on disk as safetensors: written whole or not at all, with bytes that depend on nothing but the values."""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from attribution_core.durable import flush
from attribution_core.errors import CorruptArtifactError

_DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64, "I8": np.int8, "U8": np.uint8}


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file durably: under a temporary name first, so that `path` is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by the process's number, which writers in two containers may share.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        # Straight from the arrays' memory, of which they may be most that the process holds.
        save_file({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}, temporary)
        temporary.chmod(mode)  # the library replaces the file by one that only its owner may read
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)  # the new name


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return a file's arrays.

    Raises:
        CorruptArtifactError: if it is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptArtifactError(f"{path.name} cannot be read: {error}") from error


def mapped_arrays(path: Path) -> dict[str, np.ndarray]:
    """Map a file into memory once and return its arrays as read-only views; only pages that are touched are read, and the file closes with the last view.

    Raises:
        CorruptArtifactError: if it is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
            # One mapping, and with it one open file, whatever the number of arrays: an index has many shards of many layers.
            whole = np.memmap(file, np.uint8, "r")
        data = whole[8 + size :]
        return {
            name: data[slice(*entry["data_offsets"])].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__" and 0 not in entry["shape"]
        }
    except (OSError, ValueError, KeyError) as error:
        raise CorruptArtifactError(f"{path.name} cannot be read: {error}") from error
