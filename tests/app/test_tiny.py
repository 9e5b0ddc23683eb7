"""Data sets of a handful of examples: `auto` takes what works, and what cannot work is refused at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import Loaded

SETS = {
    "tiny-one": ["1,2,0"],
    "tiny-two": ["1,2,0", "3,1,1"],
    "tiny-class": ["1,2,0", "2,1,0", "3,3,0", "0,1,0", "1,1,0"],
    "tiny-alone": ["1,0,0", "2,0,1", "3,0,0", "4,5,1"],
    "tiny-mixed": ["1,2,0", "2,1,1", "3,3,0", "0,1,1", "1,1,0"],
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


def optimum(inputs: Tensor, targets: Tensor, task: str, l2: float) -> Tensor:
    """The parameters (outputs, inputs + 1) of the smallest mean loss + l2/2 ‖θ‖², the bias last, in float64."""
    ones = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    found = torch.zeros(1 if task == "regression" else 2, ones.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        output = ones @ found.T
        loss = (
            (output[:, 0] - targets).square().mean() / 2 if task == "regression" else F.cross_entropy(output, targets)
        )
        optimizer.zero_grad()
        total = loss + l2 / 2 * found.square().sum()
        total.backward()
        return total

    optimizer.step(objective)
    return found.detach()


@pytest.mark.parametrize("model", MODELS)
def test_exact_scores_are_those_of_refits(tiny: Loaded, tmp_path: Path, model: str) -> None:
    service, name, (architecture, task) = tiny.service, f"{model}-trained", MODELS[model]
    table = torch.tensor(np.loadtxt(SETS["tiny-mixed"], delimiter=",", dtype=np.float32))
    inputs, targets = table[:, :2], table[:, 2].long()
    whole = optimum(inputs, targets, task, 0.1)
    body = {"name": name, "architecture": architecture, "task": {"type": task}}
    keys = service.post("/v1/models", body, 201)["parameters"]
    weights = {key: whole[:, :2] if key.endswith("weight") else whole[:, 2] for key in keys}
    save_file({key: value.float().contiguous() for key, value in weights.items()}, tmp_path / "weights.safetensors")
    service.upload(
        f"/v1/models/{name}/checkpoints", tmp_path / "weights.safetensors", 201, meta={"run": "r", "step": 1}
    )
    fit = {
        "name": name,
        "model": name,
        "dataset": "tiny-mixed",
        "method": {"type": "exact", "l2": 0.1, "estimator": "newton"},
        "measurement": "prediction" if task == "regression" else "margin",
    }
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    asked = [0, 3]
    answer = service.post(
        f"/v1/indexes/{name}/attributions", {"queries": [{"dataset": "tiny-mixed", "rows": asked}], "top_k": 5}
    )
    others = [np.delete(np.arange(5), row) for row in range(5)]
    changes = torch.stack(
        [whole - optimum(inputs[rest], targets[rest], task, 0.1) for rest in others]
    )  # (5, outputs, 3)
    for row, result in zip(asked, answer["results"], strict=True):
        outputs = changes @ torch.cat([inputs[row], torch.ones(1)]).double()  # (5, outputs)
        # Of two classes the margin is the difference of the logits.
        effects = outputs[:, 0] if task == "regression" else outputs[:, targets[row]] - outputs[:, 1 - targets[row]]
        found = {entry["row"]: entry["score"] for entry in result["positive"] + result["negative"]}
        assert [found[place] for place in range(5)] == pytest.approx(effects.tolist(), rel=1e-3, abs=1e-5)


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
