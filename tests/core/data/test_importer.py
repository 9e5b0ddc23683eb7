"""One content whatever the format, and one report of everything that is wrong."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attribution_core.data import importer
from attribution_core.data.importer import DatasetProblems, import_dataset
from attribution_core.data.reader import DatasetReader
from attribution_core.errors import Cancelled, InvalidInputError
from attribution_core.progress import NoProgress
from tests.core.data.files import FORMATS, Columns, described, imported, write

COUNT = 1500  # more than one row group
GENERATOR = np.random.default_rng(0)
TENSORS: Columns = {
    "input": GENERATOR.normal(size=(COUNT, 3)).round(4).tolist(),
    "target": (np.arange(COUNT) % 7).tolist(),
    "key": [f"{row:04d}" for row in range(COUNT)],
    "source": [f"é-{row % 5}" for row in range(COUNT)],
    "weight": (np.arange(COUNT) / 4).tolist(),
    "flag": [row % 3 == 0 for row in range(COUNT)],
}
SPEC = {"id": "key", "metadata": ["source", "weight", "flag"]}
PIXELS = GENERATOR.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)


def problems(source: Path, into: Path, **spec: Any) -> tuple[list[tuple[int, str]], DatasetProblems]:
    with pytest.raises(DatasetProblems) as caught:
        imported(source, into, **spec)
    assert not list(into.iterdir())
    return [(entry["row"], entry["column"]) for entry in caught.value.problems], caught.value


def png(pixels: np.ndarray, **options: Any) -> bytes:
    with io.BytesIO() as out:
        Image.fromarray(pixels).save(out, "PNG", **options)
        return out.getvalue()


def test_every_format_gives_the_same_content(tmp_path: Path) -> None:
    summaries = [imported(write(tmp_path / f"some.{kind}", TENSORS), tmp_path / kind, **SPEC) for kind in FORMATS]
    assert len({summary.sha256 for summary in summaries}) == 1
    assert all(summary == summaries[0] for summary in summaries)
    first = summaries[0]
    assert (first.num_examples, first.target_type, first.num_classes, first.input_shape) == (COUNT, "class", 7, [3])
    assert {
        column["name"]: (column["type"], column["role"]) for column in first.columns if column["role"] != "input"
    } == {
        "id": ("string", "id"),
        "target": ("int64", "target"),
        "source": ("string", "metadata"),
        "weight": ("float64", "metadata"),
        "flag": ("bool", "metadata"),
    }
    for kind in FORMATS:
        found = DatasetReader(tmp_path / kind, described(**SPEC)).read([1, COUNT - 1])
        assert found.ids == ["0001", "1499"]
        np.testing.assert_array_equal(found.inputs[1], np.float32(TENSORS["input"][-1]))
        assert found.metadata[0] == {"source": "é-1", "weight": 0.25, "flag": False}


@pytest.mark.parametrize("kind", ["tabular", "tokens", "text", "targets"])
def test_other_kinds_do_not_depend_on_the_format_either(kind: str, tmp_path: Path) -> None:
    cases: dict[str, tuple[Columns, dict[str, Any]]] = {
        "tabular": ({"a": [1, 2], "b": [0.5, 1.5], "target": [0, 1]}, {"kind": "tabular", "input": ["b", "a"]}),
        "tokens": ({"input": [[1, 2], [3, 4]]}, {"kind": "tokens", "target": None}),
        "text": ({"input": ["123", "45"]}, {"kind": "text", "target": None}),
        "targets": ({"input": [[1.0], [2.0]], "target": [[0.5, 1.0], [2.0, 3.0]]}, {}),
    }
    columns, spec = cases[kind]
    forms = [form for form in FORMATS if (kind, form) != ("targets", "csv")]  # a cell is one number
    summaries = [imported(write(tmp_path / f"some.{form}", columns), tmp_path / form, **spec) for form in forms]
    assert all(summary == summaries[0] for summary in summaries)
    assert summaries[0].target_type == {"tabular": "class", "targets": "vector"}.get(kind)


def test_an_image_is_its_pixels_whatever_holds_them(tmp_path: Path) -> None:
    encoded = {
        "array": ("npz", PIXELS),
        "tight": ("parquet", [png(one, compress_level=9) for one in PIXELS]),
        "loose": ("parquet", [png(one, compress_level=0) for one in PIXELS]),
        "base64": ("jsonl", [base64.b64encode(png(one)).decode() for one in PIXELS]),
        "lists": ("jsonl", PIXELS.tolist()),
        "first": ("npz", PIXELS.transpose(0, 3, 1, 2)),
    }
    summaries = {}
    for name, (kind, values) in encoded.items():
        source = write(tmp_path / f"{name}.{kind}", {"input": list(values), "target": [0, 1, 0]})
        spec = {"kind": "image", "channels_first": name == "first"}
        summaries[name] = imported(source, tmp_path / name, **spec)
        found = DatasetReader(tmp_path / name, described(**spec)).read(range(3)).inputs
        np.testing.assert_array_equal(np.stack(found), PIXELS)
    assert len({summary.sha256 for summary in summaries.values()}) == 1
    assert summaries["array"].input_shape == [3, 4, 5]


@pytest.mark.parametrize("change", ["input", "target", "key", "source", "order", "metadata", "kind"])
def test_other_content_has_another_hash(change: str, tmp_path: Path) -> None:
    columns: Columns = {name: values[:4] for name, values in TENSORS.items()}
    first = imported(write(tmp_path / "a.parquet", columns), tmp_path / "a", **SPEC)
    spec: dict[str, Any] = dict(SPEC)
    if change == "order":
        columns = {name: values[::-1] for name, values in columns.items()}
    elif change == "metadata":
        spec["metadata"] = ["source"]
    elif change == "kind":
        spec["kind"] = "tabular"
    else:
        other = {"input": [1.0, 2.0, 3.0], "target": 6, "key": "x", "source": "y"}[change]
        columns = {**columns, change: [*columns[change][:3], other]}
    assert imported(write(tmp_path / "b.parquet", columns), tmp_path / "b", **spec).sha256 != first.sha256


def test_every_problem_is_reported_with_its_row(tmp_path: Path) -> None:
    good = '{"input": [1, 2], "target": 0, "key": "%d", "source": "a"}'
    lines = [good % row for row in range(1100)]
    bad = {
        3: ("input", '{"input": [1, NaN], "target": 0, "key": "3"}', ""),
        5: ("input", '{"input": [1, 1e999], "target": 0, "key": "5"}', "input"),
        7: ("input", '{"input": [1, 2, 3], "target": 0, "key": "7"}', "input"),
        9: ("target", '{"input": [1, 2], "target": null, "key": "9"}', "target"),
        11: ("key", '{"input": [1, 2], "target": 0, "key": "0"}', "key"),
        13: ("key", '{"input": [1, 2], "target": 0, "key": ""}', "key"),
        15: ("source", '{"input": [1, 2], "target": 0, "key": "15", "source": "\\u0000"}', "source"),
        17: ("source", '{"input": [1, 2], "target": 0, "key": "17", "source": [1]}', "source"),
        19: ("", "{", ""),
        21: ("source", '{"input": [1, 2], "target": 0, "key": "21", "source": "\\ud800"}', "source"),
        1050: ("target", '{"input": [1, 2], "target": "1", "key": "1050"}', "target"),
        1060: ("key", '{"input": [1, 2], "target": 0, "key": 1060.5}', "key"),
    }
    for row, (_, line, _) in bad.items():
        lines[row] = line
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    found, error = problems(tmp_path / "some.jsonl", tmp_path / "data", id="key", metadata=["source"])
    assert found == [(row, column) for row, (_, _, column) in bad.items()]
    assert error.total == len(bad)


def test_a_row_may_have_several_problems_and_a_long_list_is_cut(tmp_path: Path) -> None:
    columns: Columns = {"input": [[1.0], [float("nan")], [2.0]], "target": [0.5, float("inf"), 1.0]}
    found, _ = problems(write(tmp_path / "some.parquet", columns), tmp_path / "data")
    assert found == [(1, "input"), (1, "target")]
    many: Columns = {"input": [[1.0]] * 300, "target": [None] * 300}
    found, error = problems(write(tmp_path / "many.jsonl", many), tmp_path / "data")
    assert len(found) == 100
    assert error.total == 300


@pytest.mark.parametrize(
    ("columns", "spec", "problem"),
    [
        ({"input": [[1.0], [2.0]], "target": [0, [1.0]]}, {}, "mixes numbers and lists"),
        ({"input": [[1.0], [2.0]], "target": [[0.0], [1.0, 2.0]]}, {}, "2 target values"),
        ({"input": [[1.0], [2.0]], "target": [0, 1], "m": ["a", 1]}, {"metadata": ["m"]}, "mixes int, str"),
        ({"input": [[1.0], [2.0]], "target": [0, 1], "m": [True, 1]}, {"metadata": ["m"]}, "mixes bool, int"),
        ({"input": [[1.0], [2.0]], "target": [0, 1], "m": [0, 2**70]}, {"metadata": ["m"]}, "64 bits"),
        ({"input": [[1.0], [2.0]], "target": [0, True]}, {}, "must be a number"),
        ({"input": [[1.0, 2.0], [1.0]], "target": [0, 1]}, {"shape": [2]}, "shape [1]"),
        ({"input": np.ones((2,) + (1,) * 9).tolist(), "target": [0, 1]}, {}, "8 dimensions"),
        ({"input": [[[1.0], [2.0, 3.0]]], "target": [0]}, {}, "different lengths"),
        ({"input": [[]], "target": [0]}, {}, "empty"),
        ({"input": ["a\x00b"], "target": [0]}, {"kind": "text"}, "NUL"),
        ({"input": [[1, -2]], "target": [0]}, {"kind": "tokens"}, "outside"),
        ({"input": [[1.5]], "target": [0]}, {"kind": "tokens"}, "whole numbers"),
        ({"input": [[[1], [2, 3]]], "target": [0]}, {"kind": "tokens"}, "row 0, column input: expected a list"),
        ({"input": [[1.0]], "target": [[[1], [2, 3]]]}, {}, "row 0, column target: lists of different lengths"),
        ({"a": [1, None], "target": [0, 0]}, {"kind": "tabular", "input": ["a"]}, "numbers"),
    ],
)
def test_columns_that_make_no_sense_are_refused(
    columns: Columns, spec: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    _, error = problems(write(tmp_path / "some.jsonl", columns), tmp_path / "data", **spec)
    assert problem in str(error)


def test_rows_too_large_to_be_read_together_are_refused_before_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importer, "MAX_GROUP_BYTES", 1 << 20)
    fits: Columns = {"input": ["x" * 1000] * 1500, "target": [0] * 1500}
    assert imported(write(tmp_path / "a.parquet", fits), tmp_path / "a", kind="text").num_examples == 1500
    columns: Columns = {"input": ["x"] * 1024 + ["x" * 10_000] * 200, "target": [0] * 1224}
    found, error = problems(write(tmp_path / "b.parquet", columns), tmp_path / "b", kind="text")
    assert found == [(1024 + 104, "")]
    assert "the rows from 1024 on hold more than 1 MiB" in str(error)


def test_images_that_a_small_file_repeats_are_read_only_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "FREE_PIXELS", 0)
    blank = pa.DictionaryArray.from_arrays(pa.array(np.zeros(900, np.int32)), [png(np.zeros((200, 200), np.uint8))])
    pq.write_table(pa.table({"input": blank, "target": [0] * 900}), tmp_path / "some.parquet")
    allowed = 1000 * (tmp_path / "some.parquet").stat().st_size // 200**2
    found, error = problems(tmp_path / "some.parquet", tmp_path / "data", kind="image")
    assert found == [(allowed, "")] and allowed < 900
    assert "1,000 pixels for each byte" in str(error)


def test_an_import_stops_at_every_row(tmp_path: Path) -> None:
    source = write(tmp_path / "some.csv", {"input": [[1.0]] * 3000, "target": [0] * 3000})

    class Stopping(NoProgress):
        def __init__(self, after: int) -> None:
            self.left = after

        def advance(self, done: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise Cancelled("the job was stopped")

    (tmp_path / "data").mkdir()
    for after in (2, 10, 2999, 3100, 5900):
        with pytest.raises(Cancelled):
            import_dataset(source, described(), tmp_path / "data", Stopping(after))


def test_the_largest_target_has_a_class_count_that_a_database_holds(tmp_path: Path) -> None:
    columns: Columns = {"input": [[1.0]], "target": [2**63 - 1]}
    assert imported(write(tmp_path / "some.jsonl", columns), tmp_path / "data").num_classes == 2**63 - 1


def test_codes_keep_their_zeros_and_booleans_are_features(tmp_path: Path) -> None:
    """A zip code is no number; a class or a feature that is written with zeros is one."""
    (tmp_path / "some.csv").write_text("zip,share,a,b,y\n02139,0.5,true,007,01\n10001,0,false,1,02\n")
    spec = {"kind": "tabular", "input": ["a"], "target": "y", "metadata": ["zip", "share", "b"]}
    imported(tmp_path / "some.csv", tmp_path / "data", **spec)
    found = DatasetReader(tmp_path / "data", described(**spec)).read([0, 1])
    assert found.metadata == [{"zip": "02139", "share": 0.5, "b": "007"}, {"zip": "10001", "share": 0.0, "b": "1"}]
    assert [value.tolist() for value in found.inputs] == [[1.0], [0.0]] and found.targets == [1, 2]


@pytest.mark.parametrize("unit", ["ns", "s", "D"])
def test_times_of_numpy_are_refused_whatever_their_unit(unit: str, tmp_path: Path) -> None:
    times = np.array(["2024-01-01"], dtype=f"datetime64[{unit}]")
    np.savez(tmp_path / "some.npz", input=np.ones((1, 2)), target=times, key=times, when=times)
    spec = {"metadata": ["when"], "id": "key"}
    found, error = problems(tmp_path / "some.npz", tmp_path / "data", **spec)
    assert found == [(0, "target"), (0, "key"), (0, "when")]
    assert "datetime64" in str(error)


def test_numbers_of_both_types_become_real(tmp_path: Path) -> None:
    columns: Columns = {"input": [[1.0], [2.0]], "target": [0, 1.5], "m": [1, 0.5]}
    summary = imported(write(tmp_path / "some.jsonl", columns), tmp_path / "data", metadata=["m"])
    assert (summary.target_type, summary.num_classes) == ("real", None)
    found = DatasetReader(tmp_path / "data", described(metadata=["m"])).read([0])
    assert found.targets == [0.0] and found.metadata == [{"m": 1.0}]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is enormous."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def test_hostile_images_are_refused_one_by_one(tmp_path: Path) -> None:
    good = png(PIXELS[0])
    images = [good, bomb(60_000, 60_000), bomb(9_000, 9_000), bomb(4, 4), good[:-30], b"", b"GIF89a" + bytes(50),
              b"\x80\x05pickle", png(PIXELS[0][:2]), good]  # fmt: skip
    pq.write_table(pa.table({"input": images, "target": [0] * len(images)}), tmp_path / "some.parquet")
    found, error = problems(tmp_path / "some.parquet", tmp_path / "data", kind="image")
    assert found == [(row, "input") for row in range(1, 9)]
    assert "9000 × 9000 pixels is too large" in error.problems[1]["problem"]


def test_deep_grey_and_palettes_keep_what_they_show(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 255, 256], [32_768, 40_000, 65_535]], np.uint16))
    palette = Image.new("P", (1, 2))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    for name, image, expected in (
        ("grey", grey, [[[0], [0], [1]], [[128], [156], [255]]]),
        ("palette", palette, [[[10, 20, 30]], [[40, 50, 60]]]),
        ("see-through", palette, [[[10, 20, 30, 255]], [[40, 50, 60, 0]]]),
    ):
        with io.BytesIO() as out:
            image.save(out, "PNG", **({"transparency": 1} if name == "see-through" else {}))
            columns = {"input": [out.getvalue()], "target": [0]}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        imported(tmp_path / f"{name}.parquet", tmp_path / name, kind="image")
        found = DatasetReader(tmp_path / name, described(kind="image")).read([0]).inputs[0]
        assert found.tolist() == expected


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_without_rows_is_refused(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / f"some.{kind}", {"input": [], "target": []})
    with pytest.raises(InvalidInputError, match="empty"):
        imported(source, tmp_path / "data")


def test_a_name_without_a_format_needs_one(tmp_path: Path) -> None:
    source = write(tmp_path / "some.csv", {"input": [1, 2], "target": [0, 1]}).rename(tmp_path / "some.txt")
    with pytest.raises(InvalidInputError) as caught:
        imported(source, tmp_path / "data")
    assert caught.value.pointer == "/format"
    assert imported(source, tmp_path / "data", kind="tabular", input=["input"], format="csv").num_examples == 2
