"""Architectures, models and checkpoints over HTTP."""

import json
import pickle
import struct
import zipfile
from pathlib import Path
from unittest.mock import AsyncMock, MagicMock

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from app.errors import StorageFull
from app.models import endpoints, service
from tests.app.problems import is_problem
from tests.conftest import KEYS, MLP, Loaded, model

SHAPES = {"hidden_0.weight": (16, 784), "hidden_0.bias": (16,), "output.weight": (10, 16), "output.bias": (10,)}


def weights(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    found = {key: np.zeros(SHAPES[key], np.float32) for key in KEYS} | changes
    return {key: value for key, value in found.items() if value is not None}


def upload(loaded: Loaded, file: Path, **meta: object) -> tuple[int, dict]:
    with file.open("rb") as stream:
        data = {"meta": json.dumps({"run": "other", "step": 1, "final": False, **meta})}
        answer = loaded.service.http.post(
            "/v1/models/mlp/checkpoints", data=data, files={"file": ("w.safetensors", stream)}
        )
    return answer.status_code, answer.json()


def test_architectures_describe_their_arguments(loaded: Loaded) -> None:
    items = {item["name"]: item for item in loaded.service.get("/v1/architectures")["items"]}
    names = {"linear", "logistic", "mlp", "cnn", "resnet9", "transformer_lm", "hf_causal_lm", "hf_sequence_classifier"}
    assert names <= set(items)
    assert items["mlp"]["arguments"]["properties"]["hidden"]["type"] == "array"
    assert items["hf_causal_lm"]["extra"] == "hf"


def test_a_model_says_what_its_checkpoints_must_hold(loaded: Loaded) -> None:
    model = loaded.service.get("/v1/models/mlp")
    assert {key: tuple(value["shape"]) for key, value in model["parameters"].items()} == SHAPES
    assert model["num_parameters"] == 784 * 16 + 16 + 160 + 10


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"architecture": {"name": "nothing"}}, "/architecture/name"),
        ({"architecture": {"name": "mlp", "arguments": {"input_dim": 784}}}, "/architecture/arguments/hidden"),
        ({"architecture": {"name": "mlp", "arguments": {**MLP["arguments"], "hidden": [10**9]}}}, "/architecture/arguments/hidden/0"),
        ({"architecture": {"name": "mlp", "arguments": {**MLP["arguments"], "depth": 1}}}, "/architecture/arguments/depth"),
        ({"architecture": {"name": "os.system", "arguments": {}}}, "/architecture/name"),
        ({"task": {"type": "causal_lm"}}, "/task/type"),
        ({"task": {"type": "dreaming"}}, "/task"),
        ({"tokenizer": {"type": "huggingface", "source": "files:../x"}}, "/tokenizer/source"),
        ({"architecture": {"name": "hf_causal_lm", "arguments": {"config": {"model_type": "gpt2", "auto_map": {}}}}, "task": {"type": "causal_lm"}},
         "/architecture/arguments/config"),
        ({"architecture": {"name": "hf_causal_lm", "arguments": {"config": {"model_type": "evil"}}}, "task": {"type": "causal_lm"}},
         "/architecture/arguments/config/model_type"),
    ],
)  # fmt: skip
def test_wrong_models_are_refused_with_a_pointer(loaded: Loaded, change: dict, pointer: str) -> None:
    body = {"name": "wrong", "architecture": MLP, "task": {"type": "classification"}, **change}
    answer = loaded.service.http.post("/v1/models", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["pointer"].startswith(pointer)


def test_a_good_checkpoint_is_kept(loaded: Loaded, tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "w")
    status, found = upload(loaded, tmp_path / "w", step=7, seed=3, learning_rate=0.1)
    assert status == 201
    assert (found["run"], found["step"], found["seed"], found["dtype"]) == ("other", 7, 3, "F32")
    assert loaded.service.get(f"/v1/models/mlp/checkpoints/{found['id']}") == found
    assert found in loaded.service.get("/v1/models/mlp/checkpoints")["items"]
    status, problem = upload(loaded, tmp_path / "w", step=7)
    assert (status, problem["type"]) == (409, "/problems/conflict")


async def test_an_upload_holds_no_connection_while_its_body_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    session = AsyncMock()

    async def read(*_: object) -> None:
        session.close.assert_awaited()
        raise StorageFull("no more is needed")

    monkeypatch.setattr(service, "find", AsyncMock())
    monkeypatch.setattr(endpoints, "form_of", read)
    with pytest.raises(StorageFull):
        await endpoints.create_checkpoint(MagicMock(), MagicMock(), session, MagicMock(), "mlp")


def test_every_problem_of_a_checkpoint_is_listed(loaded: Loaded, tmp_path: Path) -> None:
    bad = weights(**{"hidden_0.bias": None, "output.bias": np.zeros(3, np.float32), "extra": np.zeros(2, np.float32)})
    save_file(bad, tmp_path / "w")
    status, problem = upload(loaded, tmp_path / "w")
    assert status == 422
    for part in ("hidden_0.bias is missing", "output.bias has shape [3]", "extra is not a parameter"):
        assert part in problem["detail"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(loaded: Loaded, tmp_path: Path, value: float) -> None:
    broken = np.zeros(SHAPES["output.weight"], np.float32)
    broken[3, 4] = value
    save_file(weights(**{"output.weight": broken}), tmp_path / "w")
    status, problem = upload(loaded, tmp_path / "w")
    assert status == 422
    assert "output.weight holds NaN or infinite" in problem["detail"]


def test_anything_but_safetensors_is_refused_by_its_bytes(loaded: Loaded, tmp_path: Path) -> None:
    torch.save({"hidden_0.bias": torch.zeros(1)}, tmp_path / "zip")
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.writestr("a", "b")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    contents = {
        "pickle": pickle.dumps({"a": 1}),
        "huge-header": struct.pack("<Q", 2**63) + b"{}",
        "empty": b"",
        "truncated": struct.pack("<Q", len(header)) + header + b"\0\0",
        "trailing": struct.pack("<Q", len(header)) + header + b"\0" * 9,
        "not-json": struct.pack("<Q", 4) + b"{{{{",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in ("zip", "plain.zip", *contents):
        status, problem = upload(loaded, tmp_path / name)
        assert status == 422, name
        assert problem["type"] == "/problems/invalid-request"


def test_a_model_in_use_is_kept_and_another_goes_with_its_files(steady: Loaded, tmp_path: Path) -> None:
    service = steady.service
    assert service.http.delete("/v1/models/mlp").json()["type"] == "/problems/in-use"
    service.post("/v1/models", {"name": "brief", "architecture": MLP, "task": {"type": "classification"}}, 201)
    save_file(weights(), tmp_path / "w")
    checkpoint = service.upload("/v1/models/brief/checkpoints", tmp_path / "w", 201, meta={"run": "a", "step": 0})
    folder = service.data / "artifacts" / "checkpoints" / checkpoint["id"]
    assert folder.exists()
    assert service.http.delete("/v1/models/brief").status_code == 204
    assert service.http.get("/v1/models/brief").status_code == 404
    assert not folder.exists()


def test_names_are_unique_and_ids_and_names_are_interchangeable(loaded: Loaded) -> None:
    service = loaded.service
    found = service.get("/v1/models/mlp")
    assert service.get(f"/v1/models/{found['id']}") == found
    is_problem(service.http.post("/v1/models", json=model("mlp")), 409, "name-taken")


def test_a_name_that_is_the_id_of_another_means_that_other(loaded: Loaded) -> None:
    service = loaded.service
    found = service.get("/v1/models/mlp")
    other = service.post("/v1/models", model(found["id"]), 201)
    assert service.get(f"/v1/models/{found['id']}") == found
    assert service.get(f"/v1/models/{other['id']}") == other
    assert service.http.delete(f"/v1/models/{other['id']}").status_code == 204
    assert service.get(f"/v1/models/{found['id']}") == found
