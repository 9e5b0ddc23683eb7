"""From a user's file to the canonical data set, or to a report of everything that is wrong with it.

Two passes: the first checks every value and settles the columns' types, the second writes. Nothing is written for a file with problems.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attribution_core.data import content
from attribution_core.data.formats import Unreadable, format_of, read_rows
from attribution_core.data.reader import (
    FILE_NAME,
    METADATA_PREFIX,
    ROW_GROUP_SIZE,
    DatasetReader,
    decoded_png,
    described_schema,
)
from attribution_core.errors import InvalidInputError
from attribution_core.fingerprint import canonical_json
from attribution_core.progress import Progress, watched
from attribution_core.spec import MAX_DIMENSIONS, MAX_SIDE, DatasetSpec

MAX_LISTED_PROBLEMS = 100
MAX_CLASSES = 2**63 - 1  # as many as databases count
MAX_GROUP_BYTES = 1 << 30
# An image may stand in every row of a file that holds it once, and each takes seconds. No camera's files hold more than 100 pixels in a byte.
PIXELS_PER_BYTE = 1000
FREE_PIXELS = 1 << 30
_TYPES: dict[str, type] = {"string": str, "int64": int, "float64": float, "bool": bool}


class DatasetProblems(InvalidInputError):  # noqa: N818, it is a list of them
    """The file's rows have problems.

    Attributes:
        problems: the first 100, `{"row", "column", "problem"}`.
        total: how many there are.
    """

    def __init__(self, problems: list[dict[str, Any]], total: int) -> None:
        first = problems[0]
        where = f"row {first['row']}, column {first['column']}"
        super().__init__(f"{total} problem{'s' if total > 1 else ''}; the first: {where}: {first['problem']}")
        self.problems = problems
        self.total = total


@dataclass(frozen=True)
class DatasetSummary:
    """What an imported data set is.

    Attributes:
        sha256: of the content; it does not depend on the source's format or on how rows were batched.
        columns: `{"name", "type", "role"}` with role `id`, `input`, `target` or `metadata`.
        target_type: `class`, `real`, `vector`, or None without targets.
        num_classes: largest class + 1.
        input_shape: of one input as a model sees it; None for tokens and text.
    """

    num_examples: int
    sha256: str
    columns: list[dict[str, str]]
    target_type: str | None
    num_classes: int | None
    input_shape: list[int] | None


@dataclass
class _Findings:
    """What the first pass learns."""

    rows: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    ids: set[str] = field(default_factory=set)
    target_types: set[type] = field(default_factory=set)
    target_length: int | None = None
    max_target: int = -1
    min_target: int = 0
    metadata_types: dict[str, set[type]] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    group: int = 0
    group_bytes: int = 0
    pixels_left: int = 0

    def problem(self, row: int, column: str, text: str) -> None:
        self.total += 1
        if len(self.problems) < MAX_LISTED_PROBLEMS:
            self.problems.append({"row": row, "column": column, "problem": text})

    def count(self, row: int, value: Any) -> None:
        """Count an input or a text to its row group, which readers hold in memory as a whole.

        Raises:
            DatasetProblems: if the group is too large; the rest of the file need not be read for that.
        """
        if row // ROW_GROUP_SIZE != self.group:
            self.group, self.group_bytes = row // ROW_GROUP_SIZE, 0
        self.group_bytes += value.nbytes if isinstance(value, np.ndarray) else len(value)
        if self.group_bytes > MAX_GROUP_BYTES:
            first = self.group * ROW_GROUP_SIZE
            self.end(row, f"the rows from {first} on hold more than {MAX_GROUP_BYTES >> 20:,} MiB so far")

    def end(self, row: int, text: str) -> None:
        """Note a problem after which nothing more is read.

        Raises:
            DatasetProblems: always.
        """
        self.problem(row, "", text)
        raise DatasetProblems(self.problems, self.total)


def import_dataset(
    source: Path, spec: DatasetSpec, into: Path, progress: Progress, parent: DatasetReader | None = None
) -> DatasetSummary:
    """Convert a file to canonical Parquet in the folder `into`; with a parent, its rows come first and keep their numbers.

    The result is what importing both files as one would give.

    Raises:
        DatasetProblems: with every row's problems, after the whole file was read, or as far as its rows are not too large.
        InvalidInputError: if the file cannot be read at all.
    """
    kind = spec.format or format_of(source.name)
    if kind is None:
        raise InvalidInputError("the file name does not tell its format; set `format`", "/format")
    findings = _examined(source, kind, spec, progress, parent)
    if findings.rows == 0:
        raise InvalidInputError("the data set is empty")
    if parent is not None and not findings.total:
        _check_continued(parent, spec, findings)
    if findings.total:
        raise DatasetProblems(findings.problems, findings.total)
    schema = _schema(spec, findings)
    first = 0 if parent is None else parent.num_examples
    new = watched(_new_rows(source, kind, spec, schema, first, progress), progress)
    rows = new if parent is None else chain(parent.canonical_rows(), new)
    sha256 = _written(rows, spec, schema, into / FILE_NAME, progress)
    classes = findings.target_types == {int} and findings.min_target >= 0
    return DatasetSummary(
        num_examples=first + findings.rows,
        sha256=sha256,
        columns=described_schema(schema),
        target_type=_target_type(findings) if spec.target else None,
        num_classes=min(findings.max_target + 1, MAX_CLASSES) if spec.target and classes else None,
        input_shape=_input_shape(spec, findings.shape),
    )


def _examined(
    source: Path, kind: str, spec: DatasetSpec, progress: Progress, parent: DatasetReader | None
) -> _Findings:
    if parent is None:
        findings = _Findings(
            metadata_types={name: set() for name in spec.metadata}, shape=tuple(spec.shape or ()) or None
        )
    else:
        findings = _found_before(parent, spec)
    findings.pixels_left = FREE_PIXELS + PIXELS_PER_BYTE * source.stat().st_size
    for start, columns in read_rows(source, kind, _wanted(spec), _texts(spec), spec.metadata, progress):
        length = len(next(iter(columns.values())))
        for offset in watched(range(length), progress):
            _examine_row(start + offset, {name: values[offset] for name, values in columns.items()}, spec, findings)
        findings.rows = start + length
        progress.advance(length)
    for name, types in findings.metadata_types.items():
        if len(types - {int, float}) > (0 if types & {int, float} else 1):
            names = ", ".join(sorted(kind.__name__ for kind in types))
            findings.problem(0, name, f"the column mixes {names}")
    if len(findings.target_types) > 1 and list in findings.target_types:
        findings.problem(0, spec.target or "", "the column mixes numbers and lists")
    return findings


def _found_before(parent: DatasetReader, spec: DatasetSpec) -> _Findings:
    """Return what examining the parent's rows would have found."""
    shape = None if spec.kind in ("text", "tokens") else np.shape(parent.read([0]).inputs[0])
    ids = set(parent.ids) if spec.id else set()
    metadata: dict[str, set[type]] = {name: {_TYPES[kind]} for name, kind in parent.metadata_columns.items()}
    findings = _Findings(ids=ids, metadata_types=metadata, shape=shape)
    for target in parent.targets or []:
        _note_target(0, "", target, findings)
    return findings


def _check_continued(parent: DatasetReader, spec: DatasetSpec, findings: _Findings) -> None:
    """Note columns whose type would be another with the new rows than it was: stored rows are not converted."""
    now = described_schema(_schema(spec, findings))
    for before, after in zip(parent.described_columns, now, strict=True):
        # A list's element has another name once it was written.
        if before["type"] != after["type"] and not after["type"].startswith("list"):
            findings.problem(0, after["name"], f"the column is {before['type']} so far, and {after['type']} here")


def _examine_row(row: int, values: dict[str, Any], spec: DatasetSpec, findings: _Findings) -> None:
    unreadable = next((value for value in values.values() if isinstance(value, Unreadable)), None)
    if unreadable is not None:
        findings.problem(row, "", unreadable.problem)
        return

    def checked(column: str, check: Callable[[Any], Any], value: Any) -> Any:
        try:
            return check(value)
        except InvalidInputError as error:
            findings.problem(row, column, str(error))
            return None

    name = spec.input if isinstance(spec.input, str) else ", ".join(spec.input[:3])
    found = checked(name, lambda value: _input_value(value, spec), _raw_input(values, spec))
    if found is not None:
        findings.count(row, found)
        _note_shape(row, name, found, findings, spec)
    if spec.target is not None:
        _note_target(row, spec.target, checked(spec.target, content.as_target, values[spec.target]), findings)
    if spec.id is not None:
        given = checked(spec.id, content.as_id, values[spec.id])
        if given in findings.ids:
            findings.problem(row, spec.id, f"id {given[:80]!r} occurs twice")
        elif given is not None:
            findings.ids.add(given)
    for column in spec.metadata:
        scalar = checked(column, content.as_scalar, values[column])
        if isinstance(scalar, str):
            findings.count(row, scalar)
        if scalar is not None:
            findings.metadata_types[column].add(type(scalar))


def _note_shape(row: int, column: str, value: Any, findings: _Findings, spec: DatasetSpec) -> None:
    if spec.kind in ("text", "tokens"):
        return
    shape = np.shape(decoded_png(value)) if spec.kind == "image" else np.shape(value)
    if spec.kind == "image":
        findings.pixels_left -= shape[0] * shape[1]
        if findings.pixels_left < 0:
            findings.end(row, f"the images so far have more than {PIXELS_PER_BYTE:,} pixels for each byte of the file")
    if spec.kind == "tensor" and spec.shape and math.prod(shape) == math.prod(spec.shape) and len(shape) == 1:
        shape = tuple(spec.shape)
    if findings.shape is None:
        findings.shape = shape
        if len(shape) > MAX_DIMENSIONS or max(shape, default=1) > MAX_SIDE:
            limits = f"up to {MAX_DIMENSIONS} dimensions of up to {MAX_SIDE:,}"
            findings.problem(row, column, f"shape {list(shape)}, where an input has {limits}")
    elif shape != findings.shape:
        findings.problem(row, column, f"shape {list(shape)}, where others have {list(findings.shape)}")


def _note_target(row: int, column: str, value: Any, findings: _Findings) -> None:
    if value is None:
        return
    findings.target_types.add(type(value))
    if isinstance(value, int):
        findings.max_target, findings.min_target = max(findings.max_target, value), min(findings.min_target, value)
    if isinstance(value, list):
        if findings.target_length not in (None, len(value)):
            findings.problem(row, column, f"{len(value)} target values, where others have {findings.target_length}")
        findings.target_length = findings.target_length or len(value)


def _wanted(spec: DatasetSpec) -> list[str]:
    inputs = [spec.input] if isinstance(spec.input, str) else spec.input
    return list(dict.fromkeys([*inputs, *filter(None, (spec.target, spec.id)), *spec.metadata]))


def _texts(spec: DatasetSpec) -> list[str]:
    """Return the columns that are text by their role: an id 007 is not 7."""
    return [*filter(None, [spec.id]), *([spec.input] if spec.kind == "text" and isinstance(spec.input, str) else [])]


def _raw_input(values: dict[str, Any], spec: DatasetSpec) -> Any:
    return values[spec.input] if isinstance(spec.input, str) else [values[name] for name in spec.input]


def _input_value(value: Any, spec: DatasetSpec) -> Any:
    """Return one input in its canonical form: PNG bytes, a float32 or int32 array, or text."""
    if value is None:
        raise InvalidInputError("no input")
    match spec.kind:
        case "image":
            return content.as_png(value, spec)
        case "tensor":
            return content.as_array(value)
        case "tabular":
            array = content.as_array([value] if np.isscalar(value) else value)
            if array.ndim != 1:
                raise InvalidInputError("a table's row must be a flat list of numbers")
            return array
        case "tokens":
            return content.as_tokens(value)
        case _:
            return content.as_text(value)


def _schema(spec: DatasetSpec, findings: _Findings) -> pa.Schema:
    inputs = {
        "image": pa.binary(),
        "tensor": pa.list_(pa.float32()),
        "tabular": pa.list_(pa.float32()),
        "tokens": pa.list_(pa.int32()),
        "text": pa.string(),
    }
    targets = {"class": pa.int64(), "real": pa.float64(), "vector": pa.list_(pa.float64())}
    fields = [pa.field("id", pa.string()), pa.field("input", inputs[spec.kind])]
    if spec.target is not None:
        fields.append(pa.field("target", targets[_target_type(findings)]))
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    for name, types in findings.metadata_types.items():
        kind = float if types == {int, float} else next(iter(types), str)
        fields.append(pa.field(METADATA_PREFIX + name, kinds[kind]))
    return pa.schema(fields)


def _target_type(findings: _Findings) -> str:
    if list in findings.target_types:
        return "vector"
    return "real" if float in findings.target_types else "class"


def _written(
    rows: Iterable[dict[str, Any]], spec: DatasetSpec, schema: pa.Schema, path: Path, progress: Progress
) -> str:
    digest = hashlib.sha256(canonical_json([spec.kind, [f"{entry.name}:{entry.type}" for entry in schema]]))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in _tables(rows, spec, schema, digest.update):
            writer.write_table(table, row_group_size=ROW_GROUP_SIZE)
            progress.advance(len(table))
    return digest.hexdigest()


def _tables(
    rows: Iterable[dict[str, Any]], spec: DatasetSpec, schema: pa.Schema, update: Callable[[bytes], None]
) -> Iterator[pa.Table]:
    """Yield the canonical rows in full row groups, feeding each row's content to the hash."""
    pending: list[dict[str, Any]] = []
    for row in rows:
        update(_row_bytes(row, spec))
        pending.append(row)
        if len(pending) == ROW_GROUP_SIZE:
            yield _table(pending, schema)
            pending = []
    if pending:
        yield _table(pending, schema)


def _new_rows(
    source: Path, kind: str, spec: DatasetSpec, schema: pa.Schema, first: int, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Yield a file's rows in canonical form, numbered from `first` on."""
    for start, columns in read_rows(source, kind, _wanted(spec), _texts(spec), spec.metadata, progress):
        for offset in range(len(next(iter(columns.values())))):
            values = {name: column[offset] for name, column in columns.items()}
            yield _canonical_row(first + start + offset, values, spec, schema)


def _table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema)


def _canonical_row(row: int, values: dict[str, Any], spec: DatasetSpec, schema: pa.Schema) -> dict[str, Any]:
    value = _input_value(_raw_input(values, spec), spec)
    found: dict[str, Any] = {
        "id": content.as_id(values[spec.id]) if spec.id else str(row),
        "input": value.ravel() if isinstance(value, np.ndarray) else value,
    }
    if spec.target is not None:
        target = content.as_target(values[spec.target])
        found["target"] = float(target) if schema.field("target").type == pa.float64() else target  # type: ignore[arg-type]
    for name in spec.metadata:
        scalar = content.as_scalar(values[name])
        wants_float = schema.field(METADATA_PREFIX + name).type == pa.float64() and scalar is not None
        found[METADATA_PREFIX + name] = float(scalar) if wants_float else scalar  # type: ignore[arg-type]
    return found


def _row_bytes(row: dict[str, Any], spec: DatasetSpec) -> bytes:
    """Return a row's content; an image counts by its pixels, whatever compressed them."""
    value = row["input"]
    if spec.kind == "image":
        value = decoded_png(value)
    raw = value.encode() if isinstance(value, str) else np.ascontiguousarray(value).tobytes()
    rest = canonical_json([list(np.shape(value)), {name: entry for name, entry in row.items() if name != "input"}])
    return len(raw).to_bytes(8, "little") + raw + len(rest).to_bytes(8, "little") + rest


def _input_shape(spec: DatasetSpec, shape: tuple[int, ...] | None) -> list[int] | None:
    if shape is None:
        return None
    if spec.kind == "image":
        height, width, channels = shape
        return [channels, height, width]
    return list(shape)
