"""Rows of a canonical data set by number, by id and by a filter."""

import weakref
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from attribution_core.data.reader import FILE_NAME, DatasetReader
from attribution_core.errors import CorruptArtifactError, InvalidInputError
from attribution_core.spec import Condition
from tests.core.data.files import described, opened

COUNT = 2500  # three row groups, the last one short
COLUMNS = {
    "input": [[row, row / 2] for row in range(COUNT)],
    "target": [row % 10 for row in range(COUNT)],
    "key": [f"k{row}" for row in range(COUNT)],
    "part": [None if row % 4 == 0 else f"p{row % 3}" for row in range(COUNT)],
}
SPEC = {"id": "key", "metadata": ["part"]}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> DatasetReader:
    return opened(tmp_path_factory.mktemp("reader"), COLUMNS, **SPEC)


@pytest.mark.parametrize(
    "rows",
    [[0], [COUNT - 1], [1023, 1024, 2047, 2048], [2400, 3, 3, 1500, 0], list(range(COUNT)), np.arange(5)[::-1]],
)
def test_rows_come_back_in_the_order_asked_for(reader: DatasetReader, rows: list[int]) -> None:
    found = reader.read(rows)
    assert found.rows.tolist() == list(rows)
    np.testing.assert_array_equal(np.stack(found.inputs), np.float32([COLUMNS["input"][row] for row in rows]))
    assert found.targets == [COLUMNS["target"][row] for row in rows]
    assert found.ids == [COLUMNS["key"][row] for row in rows]
    assert [entry["part"] for entry in found.metadata] == [COLUMNS["part"][row] for row in rows]


def test_no_rows_are_no_examples(reader: DatasetReader) -> None:
    found = reader.read([])
    assert found.ids == [] and found.inputs == [] and len(found.rows) == 0


def test_a_range_is_its_rows(reader: DatasetReader) -> None:
    assert reader.read_range(1020, 1030).ids == reader.read(range(1020, 1030)).ids


def test_readers_of_other_rows_at_the_same_time_do_not_mix(
    reader: DatasetReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = DatasetReader(reader.path.parent, reader.spec)

    class Overtaken(pq.ParquetFile):
        """While the first one ends, another thread reads other rows."""

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            monkeypatch.undo()
            assert again.read([2000]).ids == ["k2000"]

    monkeypatch.setattr(pq, "ParquetFile", Overtaken)
    assert again.read([5]).ids == ["k5"]


def test_row_groups_are_kept_for_the_next_batch_unless_told_otherwise(reader: DatasetReader) -> None:
    for kept in (True, False):
        opened_again = DatasetReader(reader.path.parent, reader.spec, keep_groups=kept)
        opened_again.read([1])
        weak = weakref.ref(opened_again._read_groups(np.array([0])))
        assert (weak() is not None) == kept


@pytest.mark.parametrize("row", [-1, COUNT, 2**62])
def test_a_row_that_does_not_exist_is_named(reader: DatasetReader, row: int) -> None:
    with pytest.raises(InvalidInputError, match=str(row)):
        reader.read([0, row])


def test_descriptions_leave_the_inputs_out(reader: DatasetReader) -> None:
    assert reader.describe(np.array([2001, 4])) == [
        {"row": 2001, "id": "k2001", "target": 1, "metadata": {"part": "p0"}},
        {"row": 4, "id": "k4", "target": 4, "metadata": {"part": None}},
    ]


def test_filters_see_row_id_target_and_metadata(reader: DatasetReader) -> None:
    def rows(field: str, op: str, value: object) -> list[int]:
        return reader.matching(Condition.model_validate({"field": field, "op": op, "value": value})).tolist()

    assert rows("row", "gte", COUNT - 2) == [COUNT - 2, COUNT - 1]
    assert rows("id", "eq", "k7") == [7]
    assert rows("target", "eq", 3) == list(range(3, COUNT, 10))
    assert rows("part", "exists", False) == list(range(0, COUNT, 4))
    assert rows("part", "eq", "nothing") == []
    with pytest.raises(InvalidInputError, match="id, part, row, target"):
        rows("input", "exists", True)


def test_ids_are_looked_up_in_order(reader: DatasetReader) -> None:
    assert reader.rows_of_ids(["k2400", "k0", "k0"]).tolist() == [2400, 0, 0]
    assert reader.rows_of_ids([]).tolist() == []
    with pytest.raises(InvalidInputError, match="'nobody'"):
        reader.rows_of_ids(["k0", "nobody"])


def test_a_data_set_knows_its_shape_and_fields(reader: DatasetReader) -> None:
    assert reader.num_examples == COUNT
    assert reader.input_shape == [2]
    assert reader.metadata_columns == {"part": "string"}


def test_without_ids_targets_or_metadata_rows_are_numbered(tmp_path: Path) -> None:
    plain = opened(tmp_path, {"input": ["a", "b"]}, kind="text", target=None)
    found = plain.read([1, 0])
    assert (found.ids, found.inputs, found.targets, found.metadata) == (["1", "0"], ["b", "a"], None, [{}, {}])
    assert plain.describe(np.array([1])) == [{"row": 1, "id": "1", "target": None, "metadata": {}}]
    assert plain.input_shape is None
    with pytest.raises(InvalidInputError, match="target"):
        plain.matching(Condition(field="target", op="eq", value=1))


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match="some"):
        DatasetReader(tmp_path, described())
    path = opened(tmp_path, {"input": [[1.0]], "target": [0]}).path
    assert path.name == FILE_NAME
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40], b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifactError):
            DatasetReader(path.parent, described())
