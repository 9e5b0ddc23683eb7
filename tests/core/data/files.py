"""The same rows written in every format."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attribution_core.data.importer import DatasetSummary, import_dataset
from attribution_core.data.reader import DatasetReader
from attribution_core.progress import NoProgress
from attribution_core.spec import DatasetSpec

FORMATS = ("parquet", "jsonl", "csv", "npz")
Columns = dict[str, list[Any]]


def write(path: Path, columns: Columns) -> Path:
    """Write columns in the format that the path's ending names."""
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.table(columns), path, row_group_size=700)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in _rows(columns)))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows([[_cell(value) for value in row.values()] for row in _rows(columns)])
        case _:
            np.savez_compressed(path, **{name: np.array(values) for name, values in columns.items()})
    return path


def _rows(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def described(**spec: Any) -> DatasetSpec:
    return DatasetSpec.model_validate({"name": "some", "kind": "tensor", **spec})


def imported(source: Path, into: Path, **spec: Any) -> DatasetSummary:
    into.mkdir(exist_ok=True)
    return import_dataset(source, described(**spec), into, NoProgress())


def opened(folder: Path, columns: Columns, **spec: Any) -> DatasetReader:
    """Return the data set that these columns make."""
    source = write(folder / "source.parquet", columns)
    imported(source, folder / "data", **spec)
    return DatasetReader(folder / "data", described(**spec))
