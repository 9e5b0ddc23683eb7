"""What a job needs stays until it has ended; what cannot succeed any more is not tried again."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import MLP, Loaded, save_digits

RECIPE: dict[str, Any] = {
    "optimizer": {"type": "sgd"},
    "learning_rate": 0.05,
    "epochs": 1,
    "batch_size": 50,
}
KIND = {"kind": "image", "input": "image", "target": "label"}


def model(name: str, **recipe: Any) -> dict[str, Any]:
    return {"name": name, "architecture": MLP, "task": {"type": "classification"}, "recipe": {**RECIPE, **recipe}}


def done(loaded: Loaded, path: str, body: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = loaded.service.finished(loaded.service.post(path, body, 202))
    assert job["state"] == "succeeded", job["error"]
    return job


def refused(loaded: Loaded, path: str, job: dict[str, Any]) -> None:
    answer = loaded.service.http.delete(path)
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/in-use"), path
    assert job["id"] in answer.json()["detail"], path


@pytest.fixture(scope="module")
def small(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The shared service with the data sets `needed`, `asked` and `brief`, and the index `needed` of a model trained from its recipe."""
    folder = tmp_path_factory.mktemp("needed")
    for name, rows in {"needed": (0, 100), "asked": (100, 120), "brief": (0, 50)}.items():
        job = loaded.service.upload(
            "/v1/datasets", save_digits(folder / f"{name}.npz", *rows), 202, spec={"name": name, **KIND}
        )
        assert loaded.service.finished(job)["state"] == "succeeded"
    loaded.service.post("/v1/models", model("needed"), 201)
    done(loaded, "/v1/models/needed/trainings", {"dataset": "needed"})
    done(
        loaded,
        "/v1/indexes",
        {"name": "needed", "model": "needed", "dataset": "needed", "method": {"type": "grad_dot"}},
    )
    return loaded


@pytest.fixture
def occupied(small: Loaded) -> Iterator[dict[str, Any]]:
    """A long training that keeps the worker busy, so that other jobs stay queued."""
    service = small.service
    service.post("/v1/models", model("long", epochs=20_000), 201)
    job = service.post("/v1/models/long/trainings", {"dataset": "digits"}, 202)
    yield job
    service.http.post(f"/v1/jobs/{job['id']}/cancel")
    assert service.finished(job)["state"] == "cancelled"
    assert service.http.delete("/v1/models/long").status_code == 204


def test_what_a_job_needs_stays_until_it_has_ended(small: Loaded, occupied: dict[str, Any]) -> None:
    service = small.service
    refused(small, "/v1/models/long", occupied)
    body = {"queries": {"dataset": "asked", "count": 4}, "protocol": {"subsets": 4}}
    evaluation = service.post("/v1/indexes/needed/evaluations", body, 202)
    bank = service.get("/v1/banks")["items"][0]["id"]
    for path in ("models/needed", "datasets/needed", "datasets/asked", "indexes/needed", f"banks/{bank}"):
        refused(small, f"/v1/{path}", evaluation)
    service.post(f"/v1/jobs/{evaluation['id']}/cancel", {}, 202)
    asked = {"queries": [{"dataset": "asked", "rows": [0]}], "subsets": [{"remove": {"rows": [1]}}]}
    verification = service.post("/v1/indexes/needed/verifications", asked, 202)
    refused(small, "/v1/datasets/asked", verification)
    service.post(f"/v1/jobs/{verification['id']}/cancel", {}, 202)
    assert service.http.delete(f"/v1/banks/{bank}").status_code == 204
    assert service.http.delete("/v1/datasets/asked").status_code == 204
    for job in (evaluation, verification):
        answer = service.http.post(f"/v1/jobs/{job['id']}/retry")
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
        assert "asked" in answer.json()["detail"] or "ds_" in answer.json()["detail"]
        assert service.get(f"/v1/jobs/{job['id']}")["state"] == "cancelled"


def test_a_training_is_not_tried_again_without_its_data(small: Loaded, occupied: dict[str, Any]) -> None:
    service = small.service
    training = service.post("/v1/models/needed/trainings", {"dataset": "brief", "run": "brief"}, 202)
    refused(small, "/v1/datasets/brief", training)
    service.post(f"/v1/jobs/{training['id']}/cancel", {}, 202)
    assert service.http.delete("/v1/datasets/brief").status_code == 204
    answer = service.http.post(f"/v1/jobs/{training['id']}/retry")
    assert (answer.status_code, "data set was deleted" in answer.json()["detail"]) == (409, True)


def test_a_model_stays_while_a_recipe_starts_from_it(small: Loaded) -> None:
    service = small.service
    service.post("/v1/models", model("origin"), 201)
    done(small, "/v1/models/origin/trainings", {"dataset": "needed"})
    (start,) = service.get("/v1/models/origin/checkpoints")["items"]
    service.post("/v1/models", model("tuned", initialisation={"type": "checkpoint", "checkpoint": start["id"]}), 201)
    answer = service.http.delete("/v1/models/origin")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/in-use")
    assert "tuned" in answer.json()["detail"]
    assert service.http.delete("/v1/models/tuned").status_code == 204
    assert service.http.delete("/v1/models/origin").status_code == 204


def test_a_superseded_generation_is_not_tried_again(small: Loaded, occupied: dict[str, Any]) -> None:
    service = small.service
    first = service.post("/v1/indexes/needed/refresh", {}, 202)
    refused(small, "/v1/indexes/needed", first)
    service.post(f"/v1/jobs/{first['id']}/cancel", {}, 202)
    second = service.post("/v1/indexes/needed/refresh", {}, 202)
    answer = service.http.post(f"/v1/jobs/{first['id']}/retry")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
    assert service.get(f"/v1/jobs/{first['id']}")["state"] == "cancelled"
    service.post(f"/v1/jobs/{second['id']}/cancel", {}, 202)
