"""Files of arrays: whole or not there, whoever writes them and however writing ends."""

import os
from pathlib import Path

import numpy as np
import pytest

from attribution_core import arrays
from attribution_core.arrays import read_arrays, write_arrays

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


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """Backups are often made by another user of the same group."""
    before = os.umask(0o027)
    try:
        write_arrays(tmp_path / "shard", VALUES)
    finally:
        os.umask(before)
    assert (tmp_path / "shard").stat().st_mode & 0o777 == 0o640
