"""Safetensors files examined without torch: the header parsed strictly, the values streamed.

The format: 8 bytes of header length, a JSON header of `{name: {dtype, shape, data_offsets}}`, then the data without holes.
Anything else, whatever its file name, is refused: above all pickles and zip archives, which could run code when loaded.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from attribution_core.errors import CheckpointError
from attribution_core.fingerprint import sha256_file
from attribution_core.strict_json import without_repeats

MAX_HEADER_BYTES = 100_000_000
MAX_LISTED_PROBLEMS = 100
_BLOCK_BYTES = 1 << 22
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
# Without its sign bit a float is an integer that grows with it: (integer of its size, those bits, the largest allowed).
# F16, BF16 and F32 may be anything finite; F64 must be finite once loaded as the float32 that models compute in.
_FLOATS = {
    "F16": (np.uint16, 0x7FFF, 0x7BFF),
    "BF16": (np.uint16, 0x7FFF, 0x7F7F),
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F7FFFFF),
    "F64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x47EFFFFFE0000000),
}
_FORBIDDEN_STARTS = {b"PK\x03\x04": "a zip archive (a torch checkpoint)", b"\x80": "a pickle", b"GGUF": "a GGUF file"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype name, shape, and where its bytes are, from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class WeightsSummary:
    """What is known of a checked file."""

    sha256: str
    bytes: int
    dtype: str
    num_parameters: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors a safetensors file holds.

    Raises:
        CheckpointError: if the file is anything but well-formed safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        for magic, what in _FORBIDDEN_STARTS.items():
            if start.startswith(magic) and not _plausible_length(start, size):
                raise CheckpointError(f"this is {what}, not safetensors; only safetensors weights are accepted")
        if not _plausible_length(start, size):
            raise CheckpointError("this is not a safetensors file: its header length is impossible")
        length = int.from_bytes(start, "little")
        header = _parsed(file.read(length))
    tensors = _laid_out(header, 8 + length, size)
    _open(path)
    return tensors


def check_weights(path: Path, expected: Mapping[str, Mapping[str, Any]]) -> WeightsSummary:
    """Check a file against a model's skeleton, `{name: {"shape": […], "tied_to": name?}}`.

    Of names that are tied to one weight the file may hold any, or several with the same values.

    Raises:
        CheckpointError: naming every missing, unknown, misshapen, wrongly typed or non-finite tensor (at most 100), and
            tied ones that differ.
    """
    tensors = read_header(path)
    problems = [*_mismatches(tensors, expected)]
    if not problems:
        problems = [*_value_problems(path, tensors, expected)]
    if problems:
        more = f"; and {len(problems) - MAX_LISTED_PROBLEMS} more" if len(problems) > MAX_LISTED_PROBLEMS else ""
        raise CheckpointError("; ".join(problems[:MAX_LISTED_PROBLEMS]) + more)
    dtypes = sorted({tensors[name].dtype for name in expected if name in tensors})
    count = sum(math.prod(tensors[names[0]].shape) for names in _held(tensors, expected).values())
    return WeightsSummary(sha256_file(path), path.stat().st_size, "+".join(dtypes), count)


def _open(path: Path) -> None:
    """Refuse what the library that will read the weights would refuse, such as metadata that is not text."""
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"this is not a safetensors file: {error}") from None


def _plausible_length(start: bytes, size: int) -> bool:
    return len(start) == 8 and 2 <= int.from_bytes(start, "little") <= min(size - 8, MAX_HEADER_BYTES)


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"this is not a safetensors file: its header is not valid ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError("this is not a safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    return header


def _laid_out(header: dict[str, Any], offset: int, size: int) -> dict[str, TensorInfo]:
    """Return the header's tensors in file order, having checked that they fill the file exactly."""
    tensors = {name: _tensor(name, entry, offset) for name, entry in header.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    position = offset
    for name, info in ordered:
        if info.start != position:
            raise CheckpointError(f"the data of {name} overlaps another tensor's or leaves a hole")
        position = info.stop
    if position != size:
        raise CheckpointError(
            f"the file is {size:,} bytes and its header describes {position:,}: truncated, or extended"
        )
    return dict(ordered)


def _tensor(name: str, entry: Any, offset: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"the header entry of {name} is not {{dtype, shape, data_offsets}}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise CheckpointError(f"{name} has an unknown dtype {str(dtype)[:40]!r}")
    if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2):
        raise CheckpointError(f"the shape or offsets of {name} are not whole numbers")
    if math.prod(shape) * _DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise CheckpointError(f"the offsets of {name} do not fit its shape and dtype")
    return TensorInfo(dtype, tuple(shape), offset + offsets[0], offset + offsets[1])


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**53 for value in values)


def _mismatches(tensors: Mapping[str, TensorInfo], expected: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    held = _held(tensors, expected)
    for name in expected:
        if name not in tensors and _root(name, expected) not in held:
            yield f"{name} is missing"
    for name, info in tensors.items():
        if name not in expected:
            if info.dtype in _FLOATS:
                yield f"{name} is not a parameter of the model"
            continue
        shape = tuple(expected[name]["shape"])
        if info.shape != shape:
            yield f"{name} has shape {list(info.shape)}, the model's is {list(shape)}"
        if info.dtype not in _FLOATS:
            yield f"{name} has dtype {info.dtype}; floats (F16, BF16, F32, F64) are accepted"


def _root(name: str, expected: Mapping[str, Mapping[str, Any]]) -> str:
    return str(expected[name].get("tied_to") or name)


def _held(tensors: Mapping[str, TensorInfo], expected: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the names under which the file holds each weight of the model, by the weight's first name."""
    held: dict[str, list[str]] = {}
    for name in expected:
        if name in tensors:
            held.setdefault(_root(name, expected), []).append(name)
    return held


def _value_problems(
    path: Path, tensors: Mapping[str, TensorInfo], expected: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    with path.open("rb") as file:
        for first, *others in _held(tensors, expected).values():
            for name in (first, *others):
                if not _finite(file, tensors[name]):
                    yield f"{name} holds NaN or infinite values, or ones too large for float32"
            for name in others:
                if not _same(file, tensors[first], tensors[name]):
                    yield f"{name} and {first} are one weight of the model, and the file's values of them differ"


def _finite(file: BinaryIO, info: TensorInfo) -> bool:
    integer, magnitude, largest = _FLOATS[info.dtype]
    return all(
        not ((np.frombuffer(block, integer) & integer(magnitude)) > integer(largest)).any()
        for block in _blocks(file, info)
    )


def _same(file: BinaryIO, left: TensorInfo, right: TensorInfo) -> bool:
    if left.dtype != right.dtype:
        return False
    return all(one == other for one, other in zip(_blocks(file, left), _blocks(file, right), strict=True))


def _blocks(file: BinaryIO, info: TensorInfo) -> Iterator[bytes]:
    """Yield a tensor's bytes; several readers may take turns on one file.

    Raises:
        CheckpointError: if the file has become shorter than its header was found to say.
    """
    for start in range(info.start, info.stop, _BLOCK_BYTES):
        file.seek(start)
        wanted = min(_BLOCK_BYTES, info.stop - start)
        block = file.read(wanted)
        if len(block) != wanted:
            raise CheckpointError("the file was cut short while it was read")
        yield block
