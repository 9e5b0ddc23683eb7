"""Hostile and broken weights files: each is refused with a CheckpointError, never read wrongly, never another exception."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attribution_core.errors import CheckpointError
from attribution_core.fingerprint import sha256_file
from attribution_core.weights import check_weights, read_header

EXPECTED = {"w": {"shape": [2, 2]}, "b": {"shape": [2]}}
W = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}
DATA = np.arange(6, dtype=np.float32).tobytes()


def blob(header: Any, data: bytes = DATA) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def zipped() -> bytes:
    import io

    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("data.pkl", pickle.dumps({"w": 1}))
        return out.getvalue()


def entry(**changes: Any) -> bytes:
    return blob({"w": {**W, **changes}, "b": B})


def twice(key: str) -> bytes:
    good = json.dumps(W)
    return blob(f'{{"{key}": {good}, "{key}": {good}, "b": {json.dumps(B)}}}'.encode())


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "only a length": (0).to_bytes(8, "little"),
    "pickle protocol 2": pickle.dumps({"w": [1.0]}, protocol=2),
    "pickle protocol 5": pickle.dumps({"w": [1.0] * 4}, protocol=5) + b"\x00" * 64,
    "zip": zipped(),
    "gguf": b"GGUF" + b"\x03\x00\x00\x00" + b"\x00" * 64,
    "header length 2^63": (2**63).to_bytes(8, "little") + b"{}" + DATA,
    "header length 2^64-1": b"\xff" * 8 + b"{}",
    "header longer than the file": (1000).to_bytes(8, "little") + b"{}" + DATA,
    "header of 0 bytes": (0).to_bytes(8, "little") + DATA,
    "header not JSON": blob(b"{not json"),
    "header not UTF-8": blob(b'{"\xff": 1}'),
    "header a list": blob([W, B]),
    "header a number": blob(b"12"),
    "header nested without end": blob(b'{"w":' + b"[" * 100_000),
    "header cut": blob(json.dumps({"w": W, "b": B}).encode()[:-5]),
    "duplicate tensor": twice("w"),
    "duplicate field": blob(
        b'{"w": {"dtype": "F32", "dtype": "F64", "shape": [2, 2], "data_offsets": [0, 16]}}', DATA[:16]
    ),
    "entry null": blob({"w": None, "b": B}),
    "entry lacks shape": blob({"w": {"dtype": "F32", "data_offsets": [0, 16]}, "b": B}),
    "entry has more": entry(extra=1),
    "unknown dtype": entry(dtype="F128"),
    "dtype a list": entry(dtype=["F32"]),
    "dtype an object": entry(dtype={}),
    "negative dimension": entry(shape=[-2, -2]),
    "shape of floats": entry(shape=[2.0, 2.0]),
    "shape of booleans": blob({"w": {**W, "shape": [True, 4]}, "b": B}),
    "shape text": entry(shape="22"),
    "shape beyond 2^53": entry(shape=[2**60, 2**60]),
    "shape of NaN": blob(b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}', DATA[:16]),
    "three offsets": entry(data_offsets=[0, 8, 16]),
    "offsets reversed": entry(data_offsets=[16, 0]),
    "offsets negative": entry(data_offsets=[-16, 0]),
    "offsets too short for the shape": entry(data_offsets=[0, 12]),
    "overlapping": blob({"w": W, "b": {**B, "data_offsets": [8, 16]}}, DATA[:16]),
    "the same bytes twice": blob({"w": W, "v": W, "b": B}),
    "a hole": blob({"w": W, "b": {**B, "data_offsets": [20, 28]}}, DATA + b"\0" * 4),
    "a hole at the start": blob({"w": {**W, "data_offsets": [4, 20]}}, DATA[:20]),
    "truncated data": blob({"w": W, "b": B}, DATA[:-1]),
    "no data": blob({"w": W, "b": B}, b""),
    "bytes after the data": blob({"w": W, "b": B}, DATA + b"\x80\x04"),
    "metadata a list": blob({"__metadata__": [1], "w": W, "b": B}),
    "metadata of numbers": blob({"__metadata__": {"step": 1}, "w": W, "b": B}),
    "metadata of a lone surrogate": blob({"__metadata__": {"a": "\ud800"}, "w": W, "b": B}),
    "a pickle after the data": blob({"w": W, "b": B}, DATA + pickle.dumps(1)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(MALFORMED[name])
    with pytest.raises(CheckpointError):
        check_weights(path, EXPECTED)


@pytest.mark.parametrize(
    ("name", "what"), [("pickle protocol 5", "a pickle"), ("zip", "zip archive"), ("gguf", "GGUF")]
)
def test_refusal_names_what_the_file_is(name: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(MALFORMED[name])
    with pytest.raises(CheckpointError, match=what):
        read_header(path)


def test_a_real_torch_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save({"w": torch.zeros(2, 2), "b": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="zip archive"):
        check_weights(path, EXPECTED)


def test_a_good_file_is_summed_up(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save_file({"w": torch.zeros(2, 2), "b": torch.zeros(2, dtype=torch.float16)}, path, metadata={"format": "pt"})
    summary = check_weights(path, EXPECTED)
    assert summary.sha256 == sha256_file(path)
    assert (summary.bytes, summary.num_parameters, summary.dtype) == (path.stat().st_size, 6, "F16+F32")


def test_header_agrees_with_the_reference_writer(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    value = torch.arange(6, dtype=torch.float32).view(2, 3)
    save_file({"first": value, "second": torch.zeros(0, 4), "third": torch.ones((), dtype=torch.int64)}, path)
    header = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        "first": ("F32", (2, 3)), "second": ("F32", (0, 4)), "third": ("I64", ()),
    }  # fmt: skip
    info = header["first"]
    assert path.read_bytes()[info.start : info.stop] == value.numpy().tobytes()


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(dtype: torch.dtype, bad: float, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    value = torch.zeros(2, 2, dtype=dtype)
    value[1, 1] = bad
    save_file({"w": value, "b": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="w holds NaN or infinite"):
        check_weights(path, EXPECTED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_smallest_values_are_accepted(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    info = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    save_file({"w": torch.tensor([[info.max, info.min], [info.tiny, -0.0]], dtype=dtype), "b": torch.zeros(2)}, path)
    assert check_weights(path, EXPECTED).num_parameters == 6


@pytest.mark.parametrize("sign", [1, -1])
def test_doubles_that_would_load_as_infinity_are_refused(sign: int, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save_file({"w": torch.full((2, 2), sign * 1e39, dtype=torch.float64), "b": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="too large for float32"):
        check_weights(path, EXPECTED)


@pytest.mark.parametrize("place", [0, 4 * 2**20 // 4 - 1, 4 * 2**20 // 4, 2_000_000 - 1])
def test_values_are_checked_in_every_block(place: int, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    value = torch.zeros(2_000_000)
    value[place] = torch.nan
    save_file({"w": value}, path)
    with pytest.raises(CheckpointError, match="w holds NaN"):
        check_weights(path, {"w": {"shape": [2_000_000]}})


Change = Callable[[dict[str, torch.Tensor]], object]
MISFITS: dict[str, tuple[Change, str]] = {
    "missing": (lambda weights: weights.pop("b"), "b is missing"),
    "unknown": (lambda weights: weights.update(c=torch.zeros(1)), "c is not a parameter"),
    "transposed": (lambda weights: weights.update(w=torch.zeros(4)), r"w has shape \[4\], the model's is \[2, 2\]"),
    "integers": (lambda weights: weights.update(b=torch.zeros(2, dtype=torch.int32)), "b has dtype I32"),
    "booleans": (lambda weights: weights.update(b=torch.zeros(2, dtype=torch.bool)), "b has dtype BOOL"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_files_of_another_model_are_refused(name: str, tmp_path: Path) -> None:
    change, message = MISFITS[name]
    weights = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    change(weights)
    save_file(weights, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=message):
        check_weights(tmp_path / "weights", EXPECTED)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3), "x": torch.zeros(1), "y": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(CheckpointError) as caught:
        check_weights(tmp_path / "weights", EXPECTED)
    for part in ("b is missing", "w has shape", "x is not", "y is not"):
        assert part in str(caught.value)


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="and 51 more") as caught:
        check_weights(tmp_path / "weights", {f"p{n}": {"shape": [1]} for n in range(150)})
    assert len(str(caught.value)) < 4000


def test_an_integer_buffer_beside_the_weights_is_accepted(tmp_path: Path) -> None:
    counter = torch.tensor(7)
    save_file({"w": torch.zeros(2, 2), "b": torch.zeros(2), "batches": counter}, tmp_path / "weights")
    assert check_weights(tmp_path / "weights", EXPECTED).num_parameters == 6


TIED = {"a": {"shape": [3], "tied_to": None}, "z": {"shape": [3], "tied_to": "a"}}


@pytest.mark.parametrize("names", ["a", "z", "az"])
def test_a_tied_weight_may_be_held_under_any_of_its_names(names: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(3) for name in names}, tmp_path / "weights")
    assert check_weights(tmp_path / "weights", TIED).num_parameters == 3


def test_a_tied_weight_may_not_be_missing_altogether(tmp_path: Path) -> None:
    save_file({"c": torch.ones(3)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="a is missing; z is missing"):
        check_weights(tmp_path / "weights", TIED)


@pytest.mark.parametrize("second", [torch.zeros(3), torch.ones(3, dtype=torch.float64)])
def test_a_tied_weight_may_not_contradict_itself(second: torch.Tensor, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "z": second}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="z and a are one weight"):
        check_weights(tmp_path / "weights", TIED)
