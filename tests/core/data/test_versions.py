"""A new version of a data set: the rows before, then those of another file, as if both had been imported as one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attribution_core.data.importer import DatasetProblems, DatasetSummary, import_dataset
from attribution_core.data.reader import FILE_NAME, DatasetReader
from attribution_core.fingerprint import sha256_file
from attribution_core.progress import NoProgress
from attribution_core.spec import DatasetSpec
from tests.core.data.files import Columns, write

GENERATOR = np.random.default_rng(0)
COUNT, FIRST = 2500, 1500  # the first part ends inside a row group
ROWS: dict[str, Columns] = {
    "tensor": {"input": GENERATOR.normal(size=(COUNT, 3)).round(4).tolist(), "target": (np.arange(COUNT) % 7).tolist()},
    "text": {"input": [f"é {row}" for row in range(COUNT)], "target": (np.arange(COUNT) / 4).tolist()},
    "tokens": {"input": [list(range(row % 5 + 1)) for row in range(COUNT)], "target": (np.arange(COUNT) % 2).tolist()},
}


def part(columns: Columns, rows: slice) -> Columns:
    return {name: values[rows] for name, values in columns.items()}


def versions(folder: Path, first: Columns, then: Columns, **spec: Any) -> tuple[DatasetSummary, DatasetReader]:
    """Import two files after each other; the second as a version of the first."""
    described = DatasetSpec(name="some", **spec)
    (folder / "v1").mkdir(parents=True)
    (folder / "v2").mkdir()
    import_dataset(write(folder / "first.jsonl", first), described, folder / "v1", NoProgress())
    parent = DatasetReader(folder / "v1", described)
    summary = import_dataset(write(folder / "then.jsonl", then), described, folder / "v2", NoProgress(), parent)
    return summary, DatasetReader(folder / "v2", described)


@pytest.mark.parametrize("kind", ROWS)
def test_a_version_is_what_importing_both_files_as_one_gives(kind: str, tmp_path: Path) -> None:
    columns = {**ROWS[kind], "source": [f"s{row % 3}" for row in range(COUNT)]}
    first, then = part(columns, slice(FIRST)), part(columns, slice(FIRST, None))
    summary, reader = versions(tmp_path, first, then, kind=kind, metadata=["source"])
    (tmp_path / "whole").mkdir()
    spec = DatasetSpec(name="some", kind=kind, metadata=["source"])
    whole = import_dataset(write(tmp_path / "whole.jsonl", columns), spec, tmp_path / "whole", NoProgress())
    assert summary == whole
    assert sha256_file(tmp_path / "v2" / FILE_NAME) == sha256_file(tmp_path / "whole" / FILE_NAME)
    assert reader.ids[FIRST] == str(FIRST)


def test_images_are_kept_as_they_are_stored(tmp_path: Path) -> None:
    pixels = GENERATOR.integers(0, 256, (5, 4, 3, 1), dtype=np.uint8)
    spec = DatasetSpec(name="some", kind="image")
    for name, rows in (("first", slice(3)), ("then", slice(3, None)), ("whole", slice(None))):
        np.savez(tmp_path / f"{name}.npz", input=pixels[rows], target=np.arange(5)[rows])
        (tmp_path / name).mkdir()
    import_dataset(tmp_path / "first.npz", spec, tmp_path / "first", NoProgress())
    parent = DatasetReader(tmp_path / "first", spec)
    version = import_dataset(tmp_path / "then.npz", spec, tmp_path / "then", NoProgress(), parent)
    assert version == import_dataset(tmp_path / "whole.npz", spec, tmp_path / "whole", NoProgress())
    assert version.num_classes == 5, "classes may grow"


@pytest.mark.parametrize(
    ("then", "row", "column", "problem"),
    [
        ({"key": ["a"]}, 0, "key", "occurs twice"),
        ({"target": [0.5]}, 0, "target", "int64 so far, and float64 here"),
        ({"weight": [0.5]}, 0, "weight", "int64 so far, and float64 here"),
        ({"weight": ["x"]}, 0, "weight", "mixes"),
        ({"input": [[1.0, 2.0]]}, 0, "input", "shape [2], where others have [3]"),
    ],
)
def test_new_rows_must_be_like_the_old(then: Columns, row: int, column: str, problem: str, tmp_path: Path) -> None:
    first = {"input": [[1.0, 2, 3]] * 2, "target": [0, 1], "key": ["a", "b"], "weight": [1, 2]}
    new = {"input": [[1.0, 2, 3]], "target": [1], "key": ["c"], "weight": [3], **then}
    with pytest.raises(DatasetProblems) as caught:
        versions(tmp_path, first, new, kind="tensor", id="key", metadata=["weight"])
    assert (caught.value.problems[0]["row"], caught.value.problems[0]["column"]) == (row, column)
    assert problem in caught.value.problems[0]["problem"]
    assert not list((tmp_path / "v2").iterdir())
