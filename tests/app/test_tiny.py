"""Data sets of a handful of examples: `auto` takes what works, and what cannot work is refused at once."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Loaded

SETS = {
    "tiny-one": ["1,2,0"],
    "tiny-two": ["1,2,0", "3,1,1"],
    "tiny-class": ["1,2,0", "2,1,0", "3,3,0", "0,1,0", "1,1,0"],
    "tiny-alone": ["1,0,0", "2,0,1", "3,0,0", "4,5,1"],
}
MODELS: dict[str, Any] = {
    "tiny-linear": ({"name": "linear", "arguments": {"input_dim": 2, "output_dim": 1}}, "regression"),
    "tiny-logistic": ({"name": "logistic", "arguments": {"input_dim": 2, "num_classes": 2}}, "classification"),
}


@pytest.fixture(scope="module")
def tiny(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    service, folder = loaded.service, tmp_path_factory.mktemp("tiny")
    for name, rows in SETS.items():
        (folder / f"{name}.csv").write_text("\n".join(["a,b,label", *rows, ""]))
        spec = {"name": name, "kind": "tabular", "input": ["a", "b"], "target": "label"}
        assert (
            service.finished(service.upload("/v1/datasets", folder / f"{name}.csv", 202, spec=spec))["state"]
            == "succeeded"
        )
    for name, (architecture, task) in MODELS.items():
        body = {"name": name, "architecture": architecture, "task": {"type": task}}
        parameters = service.post("/v1/models", body, 201)["parameters"]
        generator = torch.Generator().manual_seed(0)
        weights = {key: torch.randn(entry["shape"], generator=generator) for key, entry in parameters.items()}
        save_file(weights, folder / f"{name}.safetensors")
        service.upload(
            f"/v1/models/{name}/checkpoints", folder / f"{name}.safetensors", 201, meta={"run": "r", "step": 1}
        )
    return loaded


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("dataset", SETS)
@pytest.mark.parametrize("model", MODELS)
def test_auto_takes_what_works(tiny: Loaded, model: str, dataset: str, l2: float) -> None:
    name = f"{model}-{dataset}-{l2:g}"
    body = {"name": name, "model": model, "dataset": dataset, "method": {"type": "auto", "l2": l2}}
    job = tiny.service.finished(tiny.service.post("/v1/indexes", body, 202))
    assert job["state"] == "succeeded", job["error"]
    tiny.service.post(f"/v1/indexes/{name}/attributions", {"queries": [{"dataset": dataset, "rows": [0]}]})


@pytest.mark.parametrize(
    ("dataset", "method", "pointer"),
    [
        ("tiny-one", {"l2": 0.1}, "/dataset"),
        ("tiny-one", {}, "/dataset"),
        ("tiny-two", {"optimum": "assume"}, "/method/l2"),
        ("tiny-alone", {"optimum": "polish"}, "/method/l2"),
    ],
)
def test_exact_is_refused_where_nothing_determines_the_model(
    tiny: Loaded, dataset: str, method: dict[str, Any], pointer: str
) -> None:
    for model in MODELS:
        body = {"name": "tiny-no", "model": model, "dataset": dataset, "method": {"type": "exact", **method}}
        answer = tiny.service.http.post("/v1/indexes", json=body)
        assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer])


def test_a_subset_that_leaves_a_query_nothing_is_refused_before_retraining(tiny: Loaded) -> None:
    service = tiny.service
    recipe = {"optimizer": {"type": "sgd"}, "learning_rate": 0.1, "epochs": 2, "batch_size": 1}
    architecture = {"name": "mlp", "arguments": {"input_dim": 2, "hidden": [4], "output_dim": 2}}
    body = {"name": "tiny-mlp", "architecture": architecture, "task": {"type": "classification"}, "recipe": recipe}
    service.post("/v1/models", body, 201)
    training = service.post("/v1/models/tiny-mlp/trainings", {"dataset": "tiny-one"}, 202)
    assert service.finished(training)["state"] == "succeeded"
    fit = {"name": "tiny-mlp", "model": "tiny-mlp", "dataset": "tiny-one", "method": {"type": "grad_dot"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    for subset, place in (({"remove": {"top_positive": 1}}, "remove"), ({"keep": {"top_negative": 1}}, "keep")):
        asked = {"queries": [{"dataset": "tiny-one", "rows": [0]}], "subsets": [subset]}
        answer = service.http.post("/v1/indexes/tiny-mlp/verifications", json=asked)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, f"/subsets/0/{place}")
