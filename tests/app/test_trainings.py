"""Trainings over HTTP: models made from their recipes, on real digits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.app.conftest import RECIPE
from tests.conftest import MLP, Loaded, save_digits


def test_a_model_is_trained_from_its_recipe(trained: Loaded) -> None:
    trainings = trained.service.get("/v1/models/retrained/trainings")["items"]
    runs = ["seed-0", "seed-1"]
    (training,) = [each for each in trainings if [run["run"] for run in each["runs"]] == runs]
    assert training["status"] == "succeeded"
    assert trained.service.get(f"/v1/models/retrained/trainings/{training['id']}") == training
    every = trained.service.get("/v1/models/retrained/checkpoints")["items"]
    checkpoints = [checkpoint for checkpoint in every if checkpoint["run"] in runs]
    assert len(checkpoints) == 2
    assert {checkpoint["step"] for checkpoint in checkpoints} == {48}
    assert all(checkpoint["final"] for checkpoint in checkpoints)
    assert len({checkpoint["sha256"] for checkpoint in checkpoints}) == 2
    answer = trained.service.post(
        "/v1/indexes/retrained-ekfac/attributions", {"queries": [{"dataset": "test", "rows": list(range(30))}]}
    )
    right = [result["output"]["value"] > 0 for result in answer["results"]]
    assert np.mean(right) > 0.5, "a trained model is right about most digits"


def test_trajectories_have_their_learning_rates(trained: Loaded) -> None:
    body = {"dataset": "digits", "seeds": [0], "save_every": 20, "run": "path"}
    job = trained.service.post("/v1/models/retrained/trainings", body, 202)
    assert trained.service.finished(job)["state"] == "succeeded"
    items = trained.service.get("/v1/models/retrained/checkpoints")["items"]
    path = sorted((item for item in items if item["run"] == "path-0"), key=lambda item: item["step"])
    assert [(item["step"], item["final"]) for item in path] == [(20, False), (40, False), (48, True)]
    assert all(item["learning_rate"] == pytest.approx(0.05) for item in path)
    same = next(item for item in items if item["run"] == "seed-0")
    assert path[-1]["sha256"] == same["sha256"], "the same seed trains to the same bits"


def test_very_long_trainings_are_judged_at_once(trained: Loaded) -> None:
    """Of a training of 12 million steps a few are timed, and it is refused before its checkpoints are counted one by one."""
    service = trained.service
    endless = {**RECIPE, "epochs": 1_000_000}
    body = {"name": "endless", "architecture": MLP, "task": {"type": "classification"}, "recipe": endless}
    service.post("/v1/models", body, 201)
    for more, pointer in (({}, "/max_hours"), ({"save_every": 1}, "/save_every")):
        asked = {"dataset": "digits", "max_hours": 0.001, **more}
        answer = service.http.post("/v1/models/endless/trainings", json=asked)
        assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer])


def test_a_second_training_of_the_same_runs_is_refused(trained: Loaded) -> None:
    answer = trained.service.http.post("/v1/models/retrained/trainings", json={"dataset": "digits", "seeds": [1]})
    assert answer.status_code == 409
    assert answer.json()["errors"][0]["pointer"] == "/run"


def test_diverging_retrainings_are_counted_and_left_out(trained: Loaded) -> None:
    service = trained.service
    wild = {**RECIPE, "learning_rate": 1e6}
    service.post(
        "/v1/models", {"name": "wild", "architecture": MLP, "task": {"type": "classification"}, "recipe": wild}, 201
    )
    job = service.finished(service.post("/v1/models/wild/trainings", {"dataset": "digits", "seeds": [0]}, 202))
    assert job["state"] == "failed"
    assert "diverged" in job["error"]["detail"]


def test_deleted_examples_are_trained_on_no_more(loaded: Loaded, tmp_path: Path) -> None:
    """Digits without some rows are trained on, evaluated and verified as a data set that never had them."""
    service, gone = loaded.service, [0, 7, 199]
    spec = {"kind": "image", "input": "image", "target": "label", "metadata": ["source"]}
    part = np.load(save_digits(tmp_path / "some.npz", 0, 200))
    np.savez(tmp_path / "fewer.npz", **{name: np.delete(part[name], gone, axis=0) for name in part})
    quality, weights, banks = [], [], []
    for name in ("some", "fewer"):
        imported = service.upload("/v1/datasets", tmp_path / f"{name}.npz", 202, spec={"name": f"r-{name}", **spec})
        assert service.finished(imported)["state"] == "succeeded"
        if name == "some":
            service.post("/v1/datasets/r-some/deletions", {"selector": {"rows": gone}})
        model = {"name": f"r-{name}", "architecture": MLP, "task": {"type": "classification"}, "recipe": RECIPE}
        service.post("/v1/models", model, 201)
        training = service.post(f"/v1/models/r-{name}/trainings", {"dataset": f"r-{name}", "seeds": [0]}, 202)
        assert service.finished(training)["state"] == "succeeded"
        weights.append(service.get(f"/v1/models/r-{name}/checkpoints")["items"][0]["sha256"])
        fit = {"name": f"r-{name}", "model": f"r-{name}", "dataset": f"r-{name}", "method": {"type": "grad_dot"}}
        assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
        body = {
            "queries": {"dataset": "test", "count": 10},
            "protocol": {"subsets": 8},
            "deterministic": [0.9],
            "loo": {"examples": 3, "seeds": 1},
            "removal": {"top": [5], "queries": 1, "seeds": 1},
            "mislabelled": {"field": "target", "op": "lt", "value": 2},
        }
        job = service.finished(service.post(f"/v1/indexes/r-{name}/evaluations", body, 202))
        assert job["state"] == "succeeded", job["error"]
        quality.append(service.get(f"/v1/indexes/r-{name}/evaluations")["items"][0]["quality"])
        subsets = [{"remove": {"top_positive": 5}}]
        asked = {"queries": [{"dataset": "test", "rows": [3]}], "subsets": subsets, "seeds": [0]}
        checked = service.finished(service.post(f"/v1/indexes/r-{name}/verifications", asked, 202))
        assert checked["state"] == "succeeded", checked["error"]
        (found,) = service.get(f"/v1/indexes/r-{name}/verifications")["items"]
        banks.append(found["results"][0]["predictions"][0])
    assert weights[0] == weights[1], "to the bit"
    assert banks[0] == approximately(banks[1])
    assert quality[0] == approximately(quality[1])
    asked = {"queries": [{"dataset": "test", "rows": [3]}], "subsets": [{"remove": {"rows": gone}}]}
    answer = service.http.post("/v1/indexes/r-some/verifications", json=asked)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/subsets/0/remove")
    refused = {"queries": {"dataset": "r-some", "rows": gone[:1]}, "protocol": {"subsets": 8}}
    answer = service.http.post("/v1/indexes/r-some/evaluations", json=refused)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/queries/rows")


def approximately(value: Any) -> Any:
    """JSON whose numbers may differ by rounding; ids differ."""
    if isinstance(value, dict):
        return {key: approximately(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [approximately(entry) for entry in value]
    return pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value
