"""Streaming rows out of parquet, jsonl, csv and npz files.

Every reader yields `(first row number, {column: values})` with up to 1,024 rows, fewer if they are large. A file that cannot be read at all raises; a line
that cannot be read yields `Unreadable` values, so that it is reported with its number like any other problem.
"""

import csv
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attribution_core.errors import InvalidInputError
from attribution_core.progress import NoProgress, Progress, watched
from attribution_core.strict_json import refuse_constant, without_repeats

BATCH_ROWS = 1024
BATCH_BYTES = 256 << 20
MAX_LINE_BYTES = 64 << 20
MAX_NPZ_BYTES = 8 << 30
MAX_COLUMNS = 100_000
_OBJECT_BYTES = 16  # that a number takes in memory for each byte of its text
_MAGICS = {b"PAR1": "parquet", b"PK\x03\x04": "npz"}

_CODE = re.compile(r"\s*[+-]?0\d")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What the readers raise on damaged or hostile bytes, beyond their own errors: lengths that overflow, sizes that no memory has.
_DAMAGE = (ValueError, OSError, EOFError, KeyError, OverflowError, MemoryError)

Rows = Iterator[tuple[int, dict[str, list[Any]]]]


@dataclass(frozen=True)
class Unreadable:
    """Stands in a column for a value whose line could not be read."""

    problem: str


def format_of(name: str) -> str | None:
    """Return the format a file name's ending tells, None if it tells none."""
    return {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".npz": "npz"}.get(
        Path(name).suffix.lower()
    )


def read_rows(
    path: Path,
    kind: str,
    columns: Sequence[str],
    texts: Collection[str] = (),
    codes: Collection[str] = (),
    progress: Progress | None = None,
) -> Rows:
    """Yield the named columns of a file.

    Args:
        path: the file.
        kind: its format.
        columns: those to read.
        texts: those of them whose CSV cells stay text, whatever they look like.
        codes: those of them whose CSV cells stay text if one begins with a zero that a number would lose, such as 02139.
        progress: asked whether to go on while a CSV file is read for its columns' types, which comes before any row.

    Raises:
        InvalidInputError: if the file is not what `kind` says, is damaged, or lacks a column.
    """
    _check_start(path, kind)
    if kind == "csv":
        return _csv(path, columns, texts, codes, progress or NoProgress())
    return {"parquet": _parquet, "jsonl": _jsonl, "npz": _npz}[kind](path, columns)


def _check_start(path: Path, kind: str) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise InvalidInputError("the file is empty")
    actual = _MAGICS.get(start)
    if (kind in ("parquet", "npz") or actual) and actual != kind:
        raise InvalidInputError(f"the file is not {kind}" + (f" but {actual}" if actual else ""))
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InvalidInputError("the file is UTF-16; save it as UTF-8")


def _require(columns: Sequence[str], present: Sequence[str]) -> None:
    missing = [name for name in columns if name not in set(present)]
    if missing:
        has = ", ".join(list(present)[:30])
        raise InvalidInputError(f"the file has no column {', '.join(missing[:30])}; it has {has}")


def _parquet(path: Path, columns: Sequence[str]) -> Rows:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except (pa.ArrowException, *_DAMAGE) as error:
        raise InvalidInputError(f"the parquet file is damaged: {error}") from None
    with file:
        _require(columns, names)
        twice = [name for name in columns if names.count(name) > 1]
        if twice:
            raise InvalidInputError(f"the file has more than one column {twice[0]}")
        start = 0
        try:
            for batch in _batches(path, file, columns):
                yield start, {name: _values(batch.column(name), name) for name in columns}
                start += len(batch)
        except (pa.ArrowException, *_DAMAGE) as error:
            raise InvalidInputError(f"the parquet file cannot be read after row {start}: {error}") from None


def _batches(path: Path, file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield batches that are small when they are decoded, however little of the file they take.

    A text that a dictionary holds once may stand in every row. Where all texts of a row group are small they stay in their
    dictionaries until batches were cut; else there is a dictionary too large to be kept, and few rows are read at a time.
    """
    under = tuple(f"{name}." for name in columns)
    leaves = [file.schema.column(number) for number in range(len(file.schema))]
    wanted = [n for n, leaf in enumerate(leaves) if leaf.path in columns or leaf.path.startswith(under)]
    texts = [number for number in wanted if leaves[number].physical_type == "BYTE_ARRAY"]
    with pq.ParquetFile(path, read_dictionary=[leaves[number].path for number in texts]) as in_dictionaries:
        for group in range(file.num_row_groups):
            chunks = {number: file.metadata.row_group(group).column(number) for number in wanted}
            text_bytes = sum(chunks[number].total_uncompressed_size for number in texts)
            number_bytes = sum(8 * chunk.num_values for number, chunk in chunks.items() if number not in texts)
            if number_bytes > BATCH_BYTES * file.metadata.row_group(group).num_rows:
                raise InvalidInputError(f"rows of numbers of more than {BATCH_BYTES >> 20} MiB each")
            rows = max(1, BATCH_ROWS * BATCH_BYTES // max(number_bytes, BATCH_BYTES))
            source = in_dictionaries
            if text_bytes > BATCH_BYTES:
                rows, source = max(1, min(rows, 8 * BATCH_BYTES // text_bytes)), file
            for batch in source.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False):
                yield from _cut(batch)


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield a batch in pieces small enough to become Python values."""
    half = len(batch) // 2
    if half == 0 or sum(map(_decoded_bytes, batch.columns)) <= BATCH_BYTES // 4:
        yield batch
    else:
        yield from _cut(batch[:half])
        yield from _cut(batch[half:])


def _decoded_bytes(column: pa.Array) -> int:
    """Return about how many bytes a column's values take, those of dictionaries as often as they stand in it."""
    kind = column.type
    if pa.types.is_dictionary(kind) and pa.types.is_primitive(kind.value_type):
        return len(column) * 8
    if pa.types.is_dictionary(kind):
        return pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _decoded_bytes(column.flatten())
    return int(column.nbytes)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        if file.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
            file.seek(0)
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise InvalidInputError(f"a line is longer than {MAX_LINE_BYTES >> 20} MiB")
            yield line


def _jsonl(path: Path, columns: Sequence[str]) -> Rows:
    records: list[dict[str, Any] | Unreadable] = []
    start = size = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        records.append(_record(line, number))
        size += _OBJECT_BYTES * len(line)
        if len(records) == BATCH_ROWS or size > BATCH_BYTES:
            yield start, _columns_of(records, columns)
            start, size, records = start + len(records), 0, []
    if records:
        yield start, _columns_of(records, columns)


def _values(column: pa.Array, name: str) -> list[Any]:
    """Return a column as Python values; what they are must not depend on pandas being installed."""
    if pa.types.is_temporal(column.type) and getattr(column.type, "unit", None) == "ns":
        raise InvalidInputError(f"column {name} holds times in nanoseconds: use microseconds or text")
    values: list[Any] = column.to_pylist()
    return values


def _record(line: bytes, number: int) -> dict[str, Any] | Unreadable:
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=refuse_constant, object_pairs_hook=without_repeats)
    except UnicodeDecodeError:
        return Unreadable(f"line {number} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Unreadable(f"line {number} is not strict JSON: {error}")
    return record if isinstance(record, dict) else Unreadable(f"line {number} is not a JSON object")


def _columns_of(records: Sequence[dict[str, Any] | Unreadable], columns: Sequence[str]) -> dict[str, list[Any]]:
    return {
        name: [record if isinstance(record, Unreadable) else record.get(name) for record in records] for name in columns
    }


def _csv(
    path: Path, columns: Sequence[str], texts: Collection[str], codes: Collection[str], progress: Progress
) -> Rows:
    """Cells are text; a column whose every cell is a number or a boolean is read as such, empty cells as null."""
    types = {**_csv_types(path, columns, codes, progress), **dict.fromkeys(texts, str)}
    start = 0
    for records in _csv_batches(path, columns):
        values = _columns_of(records, columns)
        yield start, {name: [_typed(value, types[name]) for value in values[name]] for name in columns}
        start += len(records)


def _csv_batches(path: Path, columns: Sequence[str]) -> Iterator[list[dict[str, Any] | Unreadable]]:
    records: list[dict[str, Any] | Unreadable] = []
    size = 0
    try:
        csv.field_size_limit(MAX_LINE_BYTES)
        reader = csv.reader((line.decode("utf-8") for line in _lines(path)), strict=True)
        header = [name.strip() for name in next(reader, [])]
        if len(header) > MAX_COLUMNS or len(set(header)) != len(header):
            raise InvalidInputError("the header names a column twice, or more than 100,000 columns")
        _require(columns, header)
        for cells in reader:
            if not cells:
                continue
            if len(cells) == len(header):
                records.append(dict(zip(header, cells, strict=True)))
            else:
                records.append(Unreadable(f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}"))
            size += sum(map(len, cells))
            if len(records) == BATCH_ROWS or size > BATCH_BYTES:
                yield records
                size, records = 0, []
    except UnicodeDecodeError:
        raise InvalidInputError("the file is not UTF-8") from None
    except csv.Error as error:
        raise InvalidInputError(f"the file is not CSV: {error}") from None
    if records:
        yield records


def _csv_types(path: Path, columns: Sequence[str], codes: Collection[str], progress: Progress) -> dict[str, type]:
    possible: dict[str, list[type]] = {name: [int, float, bool] for name in columns}
    for records in watched(_csv_batches(path, columns), progress):
        for name, values in _columns_of(records, columns).items():
            for kind in list(possible[name]):
                if any(isinstance(value, str) and value and not _reads_as(value, kind) for value in values):
                    possible[name].remove(kind)
            if name in codes and any(isinstance(value, str) and _CODE.match(value) for value in values):
                possible[name] = []
    return {name: kinds[0] if kinds else str for name, kinds in possible.items()}


def _reads_as(text: str, kind: type) -> bool:
    if kind is bool:
        return text.strip().lower() in ("true", "false")
    try:
        kind(text)
    except ValueError:
        return False
    return "_" not in text


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, str):
        return value
    if value == "":
        return None
    return value.strip().lower() == "true" if kind is bool else kind(value)


def _npz(path: Path, columns: Sequence[str]) -> Rows:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_NPZ_BYTES:
                raise InvalidInputError(f"the npz file unpacks to more than {MAX_NPZ_BYTES >> 30} GiB")
        with np.load(path, allow_pickle=False) as archive:
            _require(columns, archive.files)
            arrays = {name: archive[name] for name in columns}
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, *_DAMAGE) as error:
        raise InvalidInputError(f"the npz file is damaged, or holds Python objects: {error}") from None
    alien = next((name for name, array in arrays.items() if not isinstance(array, np.ndarray)), None)
    if alien is not None:
        raise InvalidInputError(f"{alien} is not an array")
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidInputError(f"the arrays have different lengths: {lengths}")
    for start in range(0, max(lengths.values()), BATCH_ROWS):
        yield start, {name: list(array[start : start + BATCH_ROWS]) for name, array in arrays.items()}
