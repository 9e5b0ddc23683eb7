"""Data sets over HTTP: every format, every kind of problem, filters, previews, deletion."""

import base64
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from app.datasets import examples
from app.datasets import service as datasets
from app.datasets.previews import preview_of
from app.db.embedded import get_server
from app.db.session import create_engine, create_sessionmaker
from app.db.tables import Dataset
from app.errors import NotFound
from app.settings import DatabaseSettings
from app.storage.artifacts import ArtifactStore
from app.web.pagination import Page
from attribution_core.data.importer import import_dataset
from attribution_core.progress import NoProgress
from attribution_core.spec import DatasetSpec
from tests.conftest import Loaded

ROWS = [{"x": [0.5, 1.0 + n], "y": n % 2, "name": f"e{n}", "group": "ab"[n % 2]} for n in range(20)]
SPEC = {"kind": "tensor", "input": "x", "target": "y", "id": "name", "metadata": ["group"]}


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "csv":
        lines = ["x,y,name,group", *(f'"{row["x"]}",{row["y"]},{row["name"]},{row["group"]}' for row in ROWS)]
        path.write_text("\n".join(lines))
    else:
        np.savez(path, **{key: np.array([row[key] for row in ROWS]) for key in ROWS[0]})
    return path


def test_every_format_gives_the_same_content(loaded: Loaded, tmp_path: Path) -> None:
    service, hashes = loaded.service, set()
    for kind in ("jsonl", "parquet", "csv", "npz"):
        job = service.upload("/v1/datasets", write(tmp_path, kind), 202, spec={"name": f"rows-{kind}", **SPEC})
        assert service.finished(job)["state"] == "succeeded"
        dataset = service.get(f"/v1/datasets/rows-{kind}")
        assert dataset["status"] == "ready"
        assert dataset["input_shape"] == [2]
        assert dataset["num_classes"] == 2
        hashes.add(dataset["sha256"])
    assert len(hashes) == 1
    example = service.get("/v1/datasets/rows-csv/examples/3")
    assert (example["id"], example["target"], example["metadata"]) == ("e3", 1, {"group": "b"})


def test_prefer_wait_answers_the_data_set(loaded: Loaded, tmp_path: Path) -> None:
    file = write(tmp_path, "jsonl")
    with file.open("rb") as stream:
        answer = loaded.service.http.post(
            "/v1/datasets",
            data={"spec": json.dumps({"name": "waited", **SPEC})},
            files={"file": (file.name, stream)},
            headers={"Prefer": "wait=30"},
        )
    assert answer.status_code == 200
    assert answer.json()["status"] == "ready"


def test_all_problems_are_reported_with_their_rows(loaded: Loaded, tmp_path: Path) -> None:
    lines = [dict(row) for row in ROWS]
    lines[2]["x"] = [1.0]
    lines[5]["y"] = None
    lines[7]["name"] = "e6"
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\nnot json\n" + '{"x": [1, NaN]}\n')
    job = loaded.service.upload("/v1/datasets", path, 202, spec={"name": "bad", **SPEC})
    finished = loaded.service.finished(job)
    assert finished["state"] == "failed"
    pointers = {entry["pointer"] for entry in finished["error"]["errors"]}
    assert {"/rows/2/x", "/rows/5/y", "/rows/7/name", "/rows/20/", "/rows/21/"} <= pointers
    dataset = loaded.service.get("/v1/datasets/bad")
    assert dataset["status"] == "failed"
    assert dataset["error"] == finished["error"]
    answer = loaded.service.http.get("/v1/datasets/bad/examples")
    assert answer.status_code == 409
    assert loaded.service.http.delete("/v1/datasets/bad").status_code == 204


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("truncated.parquet", b"PAR1\x00\x00"),
        ("pickled.npz", None),
        ("empty.csv", b""),
        ("header.csv", b"x,y,name,group\n"),
        ("zip.parquet", b"PK\x03\x04aaaa"),
        ("utf16.csv", "x,y,name,group\n1,2,3,4\n".encode("utf-16")),
        ("missing.jsonl", b'{"a": 1}\n'),
    ],
)
def test_hostile_files_fail_their_import_clearly(
    loaded: Loaded, tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = tmp_path / name
    if content is None:
        np.savez(path, x=np.array([{"a": 1}], dtype=object), y=np.zeros(1), name=np.zeros(1), group=np.zeros(1))
    else:
        path.write_bytes(content)
    job = loaded.service.upload("/v1/datasets", path, 202, spec={"name": f"hostile-{path.stem}", **SPEC})
    finished = loaded.service.finished(job)
    assert finished["state"] == "failed"
    assert finished["error"]["type"] != "/problems/internal", finished["error"]
    assert loaded.service.get(f"/v1/datasets/hostile-{path.stem}")["status"] == "failed"


def test_images_of_all_encodings_and_their_previews(loaded: Loaded, tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    path = tmp_path / "images.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"image": value, "label": 0})
            for value in (base64.b64encode(encoded.getvalue()).decode(), pixels.tolist())
        )
    )
    spec = {"name": "colours", "kind": "image", "input": "image", "target": "label"}
    assert loaded.service.finished(loaded.service.upload("/v1/datasets", path, 202, spec=spec))["state"] == "succeeded"
    for row in (0, 1):
        answer = loaded.service.http.get(f"/v1/datasets/colours/examples/{row}/preview")
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), pixels)


def test_previews_keep_no_row_groups(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    spec = {"kind": "tensor", "input": "x", "target": "y", "name": "kept"}
    (folder := store.workspace("job")).mkdir(exist_ok=True)
    import_dataset(write(tmp_path, "parquet"), DatasetSpec.model_validate(spec), folder, NoProgress())
    store.publish(folder, "datasets/ds_kept")
    reader = datasets.reader_of(store, Dataset(id="ds_kept", spec=spec, artifact="datasets/ds_kept"))
    assert b"0.5" in preview_of(reader, 3).content
    assert reader._last is None


def test_text_previews_are_plain_text(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "<script>alert(1)</script> ¼ 🦊"}))
    spec = {"name": "texts", "kind": "text", "input": "text", "target": None}
    assert loaded.service.finished(loaded.service.upload("/v1/datasets", path, 202, spec=spec))["state"] == "succeeded"
    answer = loaded.service.http.get("/v1/datasets/texts/examples/0/preview")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.text == "<script>alert(1)</script> ¼ 🦊"


def test_filters_select_examples(loaded: Loaded) -> None:
    http = loaded.service.http
    every = loaded.service.get("/v1/datasets/digits/examples?limit=200")["items"]
    condition = {
        "and": [
            {"field": "target", "op": "eq", "value": 4},
            {"not": {"field": "source", "op": "prefix", "value": "vendor-4"}},
        ]
    }
    found = http.get("/v1/datasets/digits/examples", params={"filter": json.dumps(condition), "limit": 200}).json()[
        "items"
    ]
    expected = [item["row"] for item in every if item["target"] == 4 and item["metadata"]["source"] != "vendor-4"]
    assert [item["row"] for item in found if item["row"] < 200] == expected
    conditions = (
        {"field": "nothing", "op": "eq", "value": 1},
        {"field": "source", "op": "gt", "value": 3},
        {"field": "target", "op": "contains", "value": "a"},
    )
    for wrong in conditions:
        answer = http.get("/v1/datasets/digits/examples", params={"filter": json.dumps(wrong)})
        assert answer.status_code == 422, answer.text


def test_a_file_under_a_root_and_no_other(loaded: Loaded) -> None:
    service = loaded.service
    spec = {"kind": "tabular", "input": ["a", "b"], "target": "label"}
    job = service.post("/v1/datasets", {"name": "from-root", **spec, "source": "files:numbers.csv"}, 202)
    assert service.finished(job)["state"] == "succeeded"
    assert service.get("/v1/datasets/from-root")["num_examples"] == 2
    sources = [
        "files:../numbers.csv", "files:/etc/passwd", "files:outside/passwd", "files:nothing.csv", "other:numbers.csv", "numbers.csv",
        "files:", "files:.", "files:./../data", "file:///etc/passwd", "http://localhost/x.csv", "files:..\\x", "files:%2e%2e/passwd",
        "files:outside/../outside/passwd", "FILES:numbers.csv", f"files:{'a' * 300}", "files:circle",
    ]  # fmt: skip
    for source in sources:
        answer = service.http.post("/v1/datasets", json={"name": "never", **spec, "source": source})
        assert answer.status_code == 422, source
    assert service.http.get("/v1/datasets/never").status_code == 404


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "n", "kind": "tensor", "colour": 1},
        {"name": "N!", "kind": "tensor"},
        {"name": "n", "kind": "video"},
        {"name": "n", "kind": "tensor", "input": ["a", "b"]},
        {"name": "n", "kind": "tensor", "input": "a", "target": "a"},
        {"name": "n", "kind": "tensor", "metadata": ["row"]},
        {"name": "n", "kind": "tensor", "shape": [0]},
        {"name": "n", "kind": "image", "normalize": {"mean": [0.0], "std": [0.0]}},
        {"name": "digits", "kind": "tensor"},
    ],
)
def test_wrong_specs_are_refused_at_once(loaded: Loaded, tmp_path: Path, spec: dict) -> None:
    file = write(tmp_path, "jsonl")
    with file.open("rb") as stream:
        answer = loaded.service.http.post(
            "/v1/datasets", data={"spec": json.dumps(spec)}, files={"file": (file.name, stream)}
        )
    assert answer.status_code == (409 if spec["name"] == "digits" else 422), answer.text


def test_wrong_forms_are_refused(loaded: Loaded, tmp_path: Path) -> None:
    http, file = loaded.service.http, write(tmp_path, "jsonl").read_bytes()
    spec = json.dumps({"name": "never", **SPEC})
    forms = [
        ({"spec": spec}, {}),
        ({}, {"file": ("a.jsonl", file)}),
        ({"spec": spec, "more": "1"}, {"file": ("a.jsonl", file)}),
        ({"spec": "{"}, {"file": ("a.jsonl", file)}),
        ({"spec": spec}, {"file": ("a.txt", file)}),
    ]
    for data, files in forms:
        answer = http.post("/v1/datasets", data=data, files=files or {"other": ("a", b"")})
        assert answer.status_code == 422, answer.text


def test_a_data_set_in_use_is_kept(steady: Loaded) -> None:
    answer = steady.service.http.delete("/v1/datasets/digits")
    assert answer.status_code == 409
    assert answer.json()["type"] == "/problems/in-use"


def test_deleting_removes_rows_and_files(loaded: Loaded, tmp_path: Path) -> None:
    service = loaded.service
    service.finished(service.upload("/v1/datasets", write(tmp_path, "jsonl"), 202, spec={"name": "gone", **SPEC}))
    dataset = service.get("/v1/datasets/gone")
    folder = service.data / "artifacts" / "datasets" / dataset["id"]
    assert (folder / "manifest.json").exists()
    assert not list((service.data / "work").glob(dataset["job"]))
    assert service.http.delete("/v1/datasets/gone").status_code == 204
    assert service.http.get("/v1/datasets/gone").status_code == 404
    assert not folder.exists()


def test_pickles_are_never_read(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    path.write_bytes(pickle.dumps({"x": 1}))
    job = loaded.service.upload("/v1/datasets", path, 202, spec={"name": "evil", **SPEC})
    assert loaded.service.finished(job)["state"] == "failed"


async def test_a_read_that_a_deletion_overtakes_finds_nothing(loaded: Loaded, tmp_path: Path) -> None:
    """Its row was there, its files are not: they are not damaged."""
    spec = {"kind": "tabular", "input": ["a"], "name": "gone"}
    gone = Dataset(id="ds_gone", name="gone", spec=spec, artifact="datasets/ds_gone", num_examples=1)
    server = get_server(loaded.service.data.resolve() / "postgres", cleanup_mode=None)
    database = create_engine(DatabaseSettings(url=server.get_uri()))
    async with create_sessionmaker(database)() as session:
        with pytest.raises(NotFound):
            await examples.example(session, ArtifactStore(tmp_path), gone, 0)
        with pytest.raises(NotFound):
            await examples.examples(session, ArtifactStore(tmp_path), gone, Page(limit=5, cursor=None), None)
    await database.dispose()
