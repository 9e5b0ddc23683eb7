"""Reading a canonical data set: rows by number, by id, or by a filter; free of torch.

Canonical is one file `examples.parquet` with columns `id`, `input`, `target` and `metadata.<name>`, in row groups of 1,024.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from attribution_core.data.filters import mask_of
from attribution_core.errors import CorruptArtifactError, InvalidInputError
from attribution_core.spec import DatasetSpec, Filter

FILE_NAME = "examples.parquet"
ROW_GROUP_SIZE = 1024
METADATA_PREFIX = "metadata."


@dataclass(frozen=True)
class Examples:
    """Some rows of a data set.

    Attributes:
        rows: (n,) int64.
        ids: one string per row.
        inputs: uint8 (H, W, C) arrays, float32 arrays, int32 token arrays, or strings, by the data set's kind.
        targets: ints, floats or lists of floats; None when the data set has none.
        metadata: one dict per row.
    """

    rows: np.ndarray
    ids: list[str]
    inputs: list[Any]
    targets: list[Any] | None
    metadata: list[dict[str, Any]]


class DatasetReader:
    """An imported data set. Safe to share between threads: every read opens the file anew.

    Args:
        folder: the data set's artifact.
        spec: how its values are read.
        keep_groups: whether the row groups of the last read stay in memory, for those who read batch after batch.

    Raises:
        CorruptArtifactError: if the file is missing or unreadable.
    """

    def __init__(self, folder: Path, spec: DatasetSpec, *, keep_groups: bool = True) -> None:
        self.path = folder / FILE_NAME
        self.spec = spec
        try:
            self._metadata = pq.read_metadata(self.path)
        except (OSError, pa.ArrowInvalid) as error:
            raise CorruptArtifactError(f"data set {spec.name} cannot be read: {error}") from error
        self._schema = self._metadata.schema.to_arrow_schema()
        self._keep_groups = keep_groups
        self._last: tuple[list[int], pa.Table] | None = None

    @property
    def num_examples(self) -> int:
        """Rows in the data set."""
        return int(self._metadata.num_rows)

    @cached_property
    def metadata_columns(self) -> dict[str, str]:
        """Metadata field names with their types: string, int64, float64 or bool."""
        names = [name for name in self._schema.names if name.startswith(METADATA_PREFIX)]
        return {name.removeprefix(METADATA_PREFIX): _type_name(self._schema.field(name).type) for name in names}

    @property
    def described_columns(self) -> list[dict[str, str]]:
        """Every column as `{"name", "type", "role"}`."""
        return described_schema(self._schema)

    @property
    def ids(self) -> list[str]:
        """Every row's id."""
        found: list[str] = self._labels["id"].to_pylist()
        return found

    @property
    def targets(self) -> list[Any] | None:
        """Every row's target; None when the data set has none."""
        return self._labels["target"].to_pylist() if "target" in self._schema.names else None

    def canonical_rows(self) -> Iterator[dict[str, Any]]:
        """Yield every row as it is stored, number lists as arrays."""
        arrays = {"tensor": np.float32, "tabular": np.float32, "tokens": np.int32}
        for group in range(self._metadata.num_row_groups):
            table = self._read_groups(np.array([group]))
            columns = {name: table[name].to_pylist() for name in table.column_names if name != "input"}
            column = table["input"].combine_chunks()
            dtype = arrays.get(self.spec.kind)
            columns["input"] = column.to_pylist() if dtype is None else _lists(column, dtype)
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    @cached_property
    def input_shape(self) -> list[int] | None:
        """Shape of one input as a model sees it; None for tokens and text."""
        if self.spec.kind in ("tokens", "text"):
            return None
        shape = np.shape(self.read([0]).inputs[0])
        return [shape[2], shape[0], shape[1]] if self.spec.kind == "image" else list(shape)

    def read(self, rows: Sequence[int] | np.ndarray) -> Examples:
        """Return the given rows, in the given order; a row may be asked for twice.

        Raises:
            InvalidInputError: naming a row that does not exist.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        outside = wanted[(wanted < 0) | (wanted >= self.num_examples)]
        if len(outside):
            raise InvalidInputError(
                f"row {outside[0]} does not exist: data set {self.spec.name} has {self.num_examples} rows"
            )
        groups, inside = np.divmod(wanted, ROW_GROUP_SIZE)
        present = np.unique(groups)
        table = self._read_groups(present)
        # Rows of the groups that were read follow each other in the table; only the data set's last group may be short.
        return self._examples(wanted, table.take(pa.array(np.searchsorted(present, groups) * ROW_GROUP_SIZE + inside)))

    def read_range(self, start: int, stop: int) -> Examples:
        """Return rows `start … stop - 1`."""
        return self.read(np.arange(start, stop))

    def describe(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Return `{"row", "id", "target", "metadata"}` of the given rows, without decoding their inputs."""
        columns = self._labels
        names = list(self.metadata_columns)
        found = []
        for row in rows.tolist():
            metadata = {name: columns[METADATA_PREFIX + name][row].as_py() for name in names}
            target = columns["target"][row].as_py() if "target" in columns.column_names else None
            found.append({"row": row, "id": columns["id"][row].as_py(), "target": target, "metadata": metadata})
        return found

    def metadata(self, column: str, rows: np.ndarray) -> list[Any]:
        """Return one metadata column's values of the given rows."""
        values: list[Any] = self._labels[METADATA_PREFIX + column].take(pa.array(rows)).to_pylist()
        return values

    @cached_property
    def _labels(self) -> pa.Table:
        """Every column but the inputs, kept in memory: searches and answers need them all the time."""
        return self._read_columns([name for name in self._schema.names if name != "input"])

    def matching(self, condition: Filter) -> np.ndarray:
        """Return the rows a filter selects, ascending.

        Raises:
            InvalidInputError: if a field does not exist or its value has another type.
        """
        table = self._labels.append_column("row", pa.array(np.arange(self.num_examples)))
        names = [name.removeprefix(METADATA_PREFIX) for name in table.column_names]
        return np.flatnonzero(mask_of(condition, table.rename_columns(names)))

    def rows_of_ids(self, ids: Iterable[str]) -> np.ndarray:
        """Return the rows of the given ids, in their order.

        Raises:
            InvalidInputError: naming an id that does not exist.
        """
        index = self._row_of_id
        wanted = list(ids)
        unknown = next((name for name in wanted if name not in index), None)
        if unknown is not None:
            raise InvalidInputError(f"id {unknown[:80]!r} does not exist in data set {self.spec.name}")
        return np.array([index[name] for name in wanted], dtype=np.int64)

    @cached_property
    def _row_of_id(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    def _read_columns(self, columns: list[str]) -> pa.Table:
        return pq.read_table(self.path, columns=columns, partitioning=None)

    def _read_groups(self, groups: np.ndarray) -> pa.Table:
        wanted, last = groups.tolist(), self._last
        if last is not None and last[0] == wanted:
            return last[1]
        with pq.ParquetFile(self.path) as file:
            table = file.read_row_groups(wanted, use_threads=False)
        if self._keep_groups:
            # Batches are smaller than groups: the next one mostly wants the same.
            self._last = wanted, table
        return table

    def _examples(self, rows: np.ndarray, table: pa.Table) -> Examples:
        names = [name for name in table.column_names if name.startswith(METADATA_PREFIX)]
        columns = {name.removeprefix(METADATA_PREFIX): table[name].to_pylist() for name in names}
        return Examples(
            rows=rows,
            ids=table["id"].to_pylist(),
            inputs=self._decoded_column(table["input"].combine_chunks()),
            targets=table["target"].to_pylist() if "target" in table.column_names else None,
            metadata=[dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            if columns
            else [{} for _ in rows],
        )

    def _decoded_column(self, column: pa.Array) -> list[Any]:
        match self.spec.kind:
            case "image":
                return [decoded_png(value) for value in column.to_pylist()]
            case "tensor":
                shape = self.spec.shape or [-1]
                return [value.reshape(shape) for value in _lists(column, np.float32)]
            case "tabular":
                return _lists(column, np.float32)
            case "tokens":
                return _lists(column, np.int32)
            case _:
                values: list[Any] = column.to_pylist()
                return values


def _lists(column: pa.Array, dtype: type) -> list[np.ndarray]:
    """Return a column of number lists as arrays, without a Python object per number."""
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False))])
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(dtype)
    return [flat[start:stop] for start, stop in pairwise(offsets.tolist())]


def decoded_png(data: bytes) -> np.ndarray:
    """Return an image as uint8 (H, W, C)."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def described_schema(schema: pa.Schema) -> list[dict[str, str]]:
    """Return a canonical schema's columns as `{"name", "type", "role"}`."""
    columns = []
    for entry in schema:
        role = "metadata" if entry.name.startswith(METADATA_PREFIX) else entry.name
        name = entry.name.removeprefix(METADATA_PREFIX)
        columns.append({"name": name, "type": _type_name(entry.type), "role": role})
    return columns


def _type_name(kind: pa.DataType) -> str:
    return {"double": "float64"}.get(str(kind), str(kind))
