"""Unlearned checkpoints over HTTP, compared with real retraining on real digits."""

from typing import Any

import pytest

from tests.conftest import Loaded

EXPLICIT = {"type": "explicit", "curvature": "gauss_newton", "damping": 0.1}


def test_checkpoints_are_unlearned_and_compared_with_retraining(trained: Loaded) -> None:
    service = trained.service
    fours = {"where": {"field": "target", "op": "eq", "value": 4}}
    body = {
        "forget": fours,
        "method": {"type": "newton"},
        "check": {"oracles": 4, "test": {"dataset": "test"}, "baselines": [{"type": "gradient_ascent"}]},
    }
    job = service.finished(service.post("/v1/indexes/retrained-ekfac/unlearned-checkpoints", body, 202))
    assert job["state"] == "succeeded", job["error"]
    (found,) = service.get("/v1/indexes/retrained-ekfac/unlearned-checkpoints")["items"]
    assert service.get(f"/v1/indexes/retrained-ekfac/unlearned-checkpoints/{found['id']}") == found
    assert found["forget_size"] == len(found["request"]["forget"]["rows"]) > 20
    made = [service.get(f"/v1/models/retrained/checkpoints/{entry['checkpoint']}") for entry in found["checkpoints"]]
    assert {entry["run"] for entry in made} == {"unlearned-seed-0", "unlearned-seed-1"}
    assert not any(entry["final"] for entry in made), "a later index of the final checkpoints must not take them"
    assert {entry["source"] for entry in made} == {"unlearned"}
    every = {
        "name": "every",
        "model": "retrained",
        "dataset": "digits",
        "checkpoints": "all",
        "method": {"type": "grad_dot"},
    }
    service.finished(service.post("/v1/indexes", every, 202))
    taken = [
        service.get(f"/v1/models/retrained/checkpoints/{one}")
        for one in service.get("/v1/indexes/every")["checkpoints"]
    ]
    assert {entry["source"] for entry in taken} == {"trained"}, "`all` is of trainings of the model"
    nothing, newton, ascent = found["comparison"]["results"]
    assert [entry["role"] for entry in (nothing, newton, ascent)] == ["nothing", "method", "baseline"]
    assert set(newton["sets"]) == {"forget", "retain", "test"}
    again = service.http.post("/v1/indexes/retrained-ekfac/unlearned-checkpoints", json=body)
    assert again.status_code == 409
    assert again.json()["errors"][0]["pointer"] == "/run"


@pytest.mark.parametrize(("asked", "layers"), [({"type": "auto"}, None), (EXPLICIT, ["output"])])
def test_an_index_that_auto_may_choose_is_unlearned_from_and_compared_with_retraining(
    trained: Loaded, asked: dict[str, Any], layers: list[str] | None
) -> None:
    service, name = trained.service, f"by-{asked['type']}"
    fit = {"name": name, "model": "retrained", "dataset": "digits", "method": asked, "layers": layers}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    index = service.get(f"/v1/indexes/{name}")
    if asked["type"] == "auto":
        assert (index["method"]["type"], index["choice"]["asked"]["type"]) == ("gauss_newton", "auto")
    fours = {"where": {"field": "target", "op": "eq", "value": 4}}
    body = {"forget": fours, "run": name, "check": {"oracles": 4, "test": {"dataset": "test"}}}
    job = service.finished(service.post(f"/v1/indexes/{name}/unlearned-checkpoints", body, 202))
    assert job["state"] == "succeeded", job["error"]
    (found,) = service.get(f"/v1/indexes/{name}/unlearned-checkpoints")["items"]
    nothing, newton = (one["sets"] for one in found["comparison"]["results"][:2])
    assert newton["forget"]["distance"] < nothing["forget"]["distance"]
    assert abs(newton["forget"]["loss_gap"]) < abs(nothing["forget"]["loss_gap"])


def test_a_newton_step_needs_an_index_with_a_curvature(trained: Loaded) -> None:
    service = trained.service
    fit = {"name": "flat", "model": "retrained", "dataset": "digits", "method": {"type": "grad_dot"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    body = {"forget": {"rows": [1, 2]}, "method": {"type": "newton"}, "run": "flat"}
    answer = service.http.post("/v1/indexes/flat/unlearned-checkpoints", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/method/type")


@pytest.mark.parametrize(
    ("forget", "status"),
    [({"rows": []}, 422), ({"rows": [600]}, 422), ({"top_positive": 3}, 422), ({"rows": [1, 2]}, 409)],
)
def test_forget_sets_and_models_that_cannot_be_unlearned(steady: Loaded, forget: dict[str, Any], status: int) -> None:
    """The last one asks for a comparison with retrained models of a model that has no recipe."""
    body = {"forget": forget, "method": {"type": "newton"}, "check": {"oracles": 2} if status == 409 else None}
    answer = steady.service.http.post("/v1/indexes/steady/unlearned-checkpoints", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["errors"]


def test_a_baseline_that_cannot_be_is_refused_where_it_stands(trained: Loaded) -> None:
    body = {"forget": {"rows": [1]}, "check": {"oracles": 2, "baselines": [{"type": "exact_newton"}]}}
    answer = trained.service.http.post("/v1/indexes/retrained-ekfac/unlearned-checkpoints", json={**body, "run": "no"})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/check/baselines/0/type")


@pytest.mark.parametrize("kind", ["fine_tune", "gradient_ascent", "datamodel_matching"])
def test_fine_tuning_counts_towards_the_hours(trained: Loaded, kind: str) -> None:
    body = {"forget": {"rows": [1]}, "run": "hours", "method": {"type": kind, "epochs": 10_000}, "max_hours": 1e-6}
    answer = trained.service.http.post("/v1/indexes/retrained-ekfac/unlearned-checkpoints", json=body)
    assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, ["/max_hours"])
