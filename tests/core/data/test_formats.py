"""Hostile and damaged files: whatever their bytes, reading ends with rows or with a refusal."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attribution_core.data import formats
from attribution_core.data.formats import Unreadable, format_of, read_rows
from attribution_core.errors import InvalidInputError
from tests.core.data.files import FORMATS, write

ROWS = {"input": [[float(row), -row / 2] for row in range(2500)], "target": list(range(2500))}


def read(path: Path, *columns: str, texts: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """Read everything, checking that batches follow each other."""
    kind = format_of(path.name)
    assert kind is not None
    found: dict[str, list[Any]] = {name: [] for name in columns}
    for start, part in read_rows(path, kind, columns, texts):
        assert start == len(found[columns[0]])
        assert 0 < len(part[columns[0]]) <= formats.BATCH_ROWS
        for name in columns:
            found[name] += part[name]
    return found


def refusal(path: Path, *columns: str) -> str:
    with pytest.raises(InvalidInputError) as caught:
        read(path, *(columns or ("input",)))
    return str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_come_in_order(kind: str, tmp_path: Path) -> None:
    found = read(write(tmp_path / f"some.{kind}", ROWS), "target", "input")
    assert [int(value) for value in found["target"]] == ROWS["target"]
    parsed = [json.loads(value) if kind == "csv" else list(value) for value in found["input"]]
    assert parsed == ROWS["input"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_batches_are_cut_by_what_they_hold(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BATCH_BYTES", 400_000)
    columns = {"input": ["x" * 50_000] * 60 + ["y"] * 40, "target": [[float(row)] * 50 for row in range(100)]}
    path = write(tmp_path / f"some.{kind}", columns)
    sizes = [sum(map(len, part["input"])) for _, part in read_rows(path, kind, ["input", "target"])]
    assert max(sizes) <= 450_000
    found = read(path, "input", "target")
    assert found["input"] == columns["input"]
    assert [json.loads(value) if kind == "csv" else value for value in found["target"]] == columns["target"]


def test_texts_that_repeat_are_not_decoded_before_they_are_needed(tmp_path: Path) -> None:
    """A file of a kilobyte whose rows would take 4 GB."""
    dictionary = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1024, np.int32)), ["x" * (4 << 20)])
    pq.write_table(pa.table({"input": dictionary}), tmp_path / "bomb.parquet", compression="zstd")
    before = pa.default_memory_pool().max_memory()
    first = next(read_rows(tmp_path / "bomb.parquet", "parquet", ["input"]))[1]["input"]
    assert 1 <= len(first) <= 16
    assert pa.default_memory_pool().max_memory() - before < 200 << 20


def test_a_row_of_very_many_numbers_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    numbers = pa.array(np.zeros(40_000_000, np.int8))
    pq.write_table(pa.table({"input": pa.ListArray.from_arrays([0, len(numbers)], numbers)}), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 10_000
    assert "more than 256 MiB each" in refusal(tmp_path / "bomb.parquet")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_missing_column_is_named(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"some.{kind}", {"input": [1, 2]})
    if kind == "jsonl":  # every line may have other keys
        assert read(path, "input", "label")["label"] == [None, None]
    else:
        assert "label" in refusal(path, "input", "label")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_ends_early_is_refused_or_shorter(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"some.{kind}", ROWS)
    whole = path.read_bytes()
    for share in (0, 1, 3, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:share])
        if kind in ("parquet", "npz") or share == 0:
            assert refusal(path)
            continue
        try:
            assert len(read(path, "target")["target"]) <= 2500
        except InvalidInputError:
            assert share < len(whole) - 1


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_are_refused_or_read_but_never_crash(kind: str, tmp_path: Path) -> None:
    rows = {"input": np.random.default_rng(0).normal(size=(40, 3)).tolist(), "name": [f"é{i % 3}" for i in range(40)]}
    path = write(tmp_path / f"some.{kind}", rows)
    whole = path.read_bytes()
    outcomes = set()
    for place in range(0, len(whole), max(1, len(whole) // 400)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :])
        try:
            found = read(path, "input", "name")["input"]
            outcomes.add("refused" if any(isinstance(value, Unreadable) for value in found) else "read")
        except InvalidInputError:
            outcomes.add("refused")
    assert "refused" in outcomes


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_another_format_is_refused(kind: str, tmp_path: Path) -> None:
    for other in FORMATS:
        if other != kind and {kind, other} != {"csv", "jsonl"}:
            path = tmp_path / f"{other}-named.{kind}"
            path.write_bytes(write(tmp_path / f"some.{other}", {"input": [1, 2]}).read_bytes())
            message = refusal(path)
            assert f"not {kind}" in message
            assert other in message or other in ("csv", "jsonl")


def test_endings_tell_the_format() -> None:
    names = ["a.parquet", "a.JSONL", "a.ndjson", "a.csv", "a.tar.npz", "a.txt", "a", ".csv/x"]
    assert [format_of(name) for name in names] == ["parquet", "jsonl", "jsonl", "csv", "npz", None, None, None]


def header(shape: str, descr: str = "'<f8'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(80)


ARRAYS = {
    "no array": b"hello",
    "empty": b"",
    "more than any memory": header("(1000000000000000,)"),
    "more than 64 bits": header(f"({10**23},)"),
    "overflowing product": header("(4611686018427387904, 8)"),
    "negative": header("(10, -1)"),
    "more rows than bytes": header("(11,)"),
    "shape of text": header("('a',)"),
    "code for a header": b"\x93NUMPY\x01\x00" + (20).to_bytes(2, "little") + b"__import__('os').abc\n",
    "objects": header("(1,)", "'|O'"),
}


@pytest.mark.parametrize("content", ARRAYS)
def test_forged_arrays_are_refused(content: str, tmp_path: Path) -> None:
    for member in ("input", "input.npy"):
        with zipfile.ZipFile(tmp_path / "some.npz", "w") as archive:
            archive.writestr(member, ARRAYS[content])
        assert refusal(tmp_path / "some.npz")


def test_pickled_objects_are_refused_unopened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "some.npz", input=np.array([Bomb()], dtype=object))
    assert "Python objects" in refusal(tmp_path / "some.npz")
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "some.npz", input=np.zeros(200_000))
    assert (tmp_path / "some.npz").stat().st_size < 10_000
    monkeypatch.setattr(formats, "MAX_NPZ_BYTES", 1 << 20)
    assert "unpacks" in refusal(tmp_path / "some.npz")


def test_encrypted_archives_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", input=np.zeros(3))
    content = bytearray((tmp_path / "some.npz").read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "some.npz").write_bytes(content)
    assert "encrypted" in refusal(tmp_path / "some.npz")


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", input=np.zeros(3), target=np.zeros(4))
    assert "different lengths" in refusal(tmp_path / "some.npz", "input", "target")


def test_parquet_columns_that_python_cannot_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    times = [pa.array([1], pa.timestamp("ns")), pa.array([2**62], pa.timestamp("ms"))]
    for column in times:
        pq.write_table(pa.table({"input": column}), path)
        assert refusal(path)
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["input", "input"]), path)
    assert "more than one column input" in refusal(path)


def lines(path: Path, *content: bytes) -> Path:
    path.write_bytes(b"\n".join(content))
    return path


def test_json_lines_that_cannot_be_read_are_numbered(tmp_path: Path) -> None:
    bad = [b"{", b"[1]", b"1", b'{"input": NaN}', b'{"input": -Infinity}', b'{"input": 1, "input": 2}',
           b'{"input": {"a": 1, "a": 2}}', b"\xff\xfe", b'{"input": ' + b"[" * 100_000,
           b'{"input": ' + b"1" * 5000 + b"}", b"\x00"]  # fmt: skip
    path = lines(tmp_path / "some.jsonl", b'{"input": 1}', b"", b"  ", *bad, b'{"input": 2}')
    found = read(path, "input")["input"]
    assert (found[0], found[-1]) == (1, 2)
    for number, value in enumerate(found[1:-1], 4):
        assert isinstance(value, Unreadable)
        assert value.problem.startswith(f"line {number} is not")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_utf_16_and_endless_lines_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"some.{kind}"
    for encoding in ("utf-16", "utf-16-be"):
        path.write_bytes('{"input": 1}\n'.encode(encoding) if kind == "jsonl" else "input\n1\n".encode(encoding))
        if encoding == "utf-16":
            assert "UTF-16" in refusal(path)
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1000)
    lines(path, b"input", b"1" * 2000)
    assert "longer than" in refusal(path)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    assert read(lines(tmp_path / "a.csv", mark + b'"input",b', b"1,2"), "input")["input"] == [1]
    assert read(lines(tmp_path / "a.jsonl", mark + b'{"input": 1}'), "input")["input"] == [1]


def test_ragged_lines_are_numbered(tmp_path: Path) -> None:
    path = lines(tmp_path / "some.csv", b"input,b", b"1,2", b"3", b"4,5,6", b'"7\n",8')
    found = read(path, "input", "b")
    assert [value.problem for value in found["input"][1:3]] == [
        "line 3 has 1 cells, the header 2",
        "line 4 has 3 cells, the header 2",
    ]
    assert found["b"][0] == 2 and found["b"][3] == 8


@pytest.mark.parametrize("content", [b'input\n"open', b"input,input\n1,2", b"input\n\xff", b'input\n"a"b'])
def test_broken_tables_are_refused(content: bytes, tmp_path: Path) -> None:
    assert refusal(lines(tmp_path / "some.csv", content))


def cells(path: Path, values: Iterator[str] | list[str]) -> Path:
    with io.StringIO(newline="") as out:
        csv.writer(out).writerows([["input"], *([value] for value in values)])
        path.write_bytes(out.getvalue().encode())
    return path


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["1", "-2", ""], [1, -2, None]),
        (["1", "2.5", "1e3"], [1.0, 2.5, 1000.0]),
        (["True", "false "], [True, False]),
        (["1", "x"], ["1", "x"]),
        (["1_000", "2"], ["1_000", "2"]),
        (["1", "true"], ["1", "true"]),
    ],
)
def test_cells_are_what_their_whole_column_can_be(written: list[str], meant: list[Any], tmp_path: Path) -> None:
    assert read(cells(tmp_path / "some.csv", written), "input")["input"] == meant
    kept = read(tmp_path / "some.csv", "input", texts=("input",))["input"]
    assert kept == [value or None for value in written]
