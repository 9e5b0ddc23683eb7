"""Named arrays on disk as safetensors: written whole or not at all, with bytes that depend on nothing but the values."""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from attribution_core.durable import flush
from attribution_core.errors import CorruptArtifactError

# By alignment, in the order in which safetensors lays arrays out.
_DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "U64": "uint64",
        "I64": "int64",
        "F64": "float64",
        "F32": "float32",
        "U32": "uint32",
        "I32": "int32",
        "F16": "float16",
        "U16": "uint16",
        "I16": "int16",
        "I8": "int8",
        "U8": "uint8",
        "BOOL": "bool",
    }.items()
}
_ALIGNMENT = 8
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES.values())}


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file durably: under a temporary name first, so that `path` is never half-written.

    Raises:
        OSError: if it cannot be written, with the system's number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by the process's number, which writers in two containers may share.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            ordered = sorted(arrays.items(), key=lambda item: (_ORDER[item[1].dtype], item[0]))
            file.write(_header(ordered))
            for _, value in ordered:
                file.write(np.ascontiguousarray(value).data)  # no copy: arrays may be most that the process holds
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)  # the new name


def _header(ordered: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """Return what a safetensors file begins with: the header's length and the header, padded so that what follows is aligned."""
    described, start = {}, 0
    for name, value in ordered:
        offsets = [start, start := start + value.nbytes]
        shape = list(value.shape) or [1]  # a number is an array of one
        described[name] = {"dtype": _NAMES[value.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


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
