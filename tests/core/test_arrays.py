"""Files of arrays: whole or not there, whoever writes them and however writing ends."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from attribution_core import arrays
from attribution_core.arrays import mapped_arrays, read_arrays, write_arrays
from tests.core.disk import small_files

VALUES = {"values": np.arange(5.0)}


def test_two_writers_of_one_file_both_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes in two containers that share a folder often have the same number, and write the same shard when a lease ran out."""
    path, sync = tmp_path / "shard", os.fsync

    def overtaken(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        write_arrays(path, VALUES)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", overtaken)
    write_arrays(path, VALUES)
    np.testing.assert_array_equal(read_arrays(path)["values"], VALUES["values"])
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_arrays(tmp_path / "shard", VALUES)
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(3, 5))
    kinds = [
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "bool",
    ]
    stored = {f"{place % 5} {kind} ü": (9 * abs(numbers)).astype(kind) for place, kind in enumerate(kinds)}
    stored |= {
        "columns": numbers.T,
        "part": numbers[::2, 1:3],
        "none": numbers[:0],
        "one": np.array(2.5),
        "": numbers[0],
    }
    write_arrays(tmp_path / "stored", stored)
    assert (tmp_path / "stored").read_bytes() == save({name: np.ascontiguousarray(stored[name]) for name in stored})
    for found in (read_arrays(tmp_path / "stored"), mapped_arrays(tmp_path / "stored")):
        assert all(np.array_equal(value, np.atleast_1d(stored[name])) for name, value in found.items())
    write_arrays(tmp_path / "none", {})
    assert (tmp_path / "none").read_bytes() == save({})


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    """Workers know it by its number."""
    with small_files() as most, pytest.raises(OSError, match="too large") as caught:
        write_arrays(tmp_path / "shard", {"values": np.zeros(most)})
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """Backups are often made by another user of the same group."""
    before = os.umask(0o027)
    try:
        write_arrays(tmp_path / "shard", VALUES)
    finally:
        os.umask(before)
    assert (tmp_path / "shard").stat().st_mode & 0o777 == 0o640
