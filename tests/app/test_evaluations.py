"""Evaluations over HTTP, by real retraining of a small model on real digits."""

from typing import Any

import pytest

from tests.app.conftest import PROTOCOL
from tests.conftest import Loaded

UNKNOWN = {"field": "nowhere", "op": "eq", "value": 1}


def test_an_evaluation_measures_against_real_retraining(trained: Loaded, evaluated: dict[str, Any]) -> None:
    quality = evaluated["quality"]
    low, high = quality["interval"]
    assert low < quality["lds"] < high
    assert quality["lds"] > 0.15, "EK-FAC predicts retraining of a small MLP"
    assert abs(quality["control"]["lds"]) < 0.15
    assert (quality["protocol"]["subsets"], quality["retrainings"]) == (16, 16), "tuning took the other half"
    assert quality["diverged"] == 0
    assert quality["deterministic"][0]["protocol"]["semantics"] == "mask"
    assert -1 <= quality["loo"]["correlation"] <= 1
    assert quality["removal"]["curves"]
    assert 0 <= quality["mislabel"]["auc"] <= 1
    assert quality["mixture"]
    assert quality["tuned"]["damping"] in (0.01, 0.1, 1.0)
    index = trained.service.get("/v1/indexes/retrained-ekfac")
    assert index["quality"]["lds"] == quality["lds"]
    assert trained.service.get("/v1/indexes/retrained-ekfac/quality")["quality"]["evaluation"] == evaluated["id"]


def test_answers_carry_quality_and_calibrated_intervals(trained: Loaded, evaluated: dict[str, Any]) -> None:
    half = {"remove": {"rows": list(range(0, 600, 2))}}
    few = {"remove": {"rows": [1, 2, 3]}}
    body = {"queries": [{"dataset": "test", "rows": [3, 8]}], "subsets": [half, few], "interval": 0.9}
    answer = trained.service.post("/v1/indexes/retrained-ekfac/counterfactuals", body)
    assert answer["quality"]["lds"] == evaluated["quality"]["lds"]
    assert answer["damping"] == evaluated["quality"]["tuned"]["damping"]
    for result in answer["results"]:
        inside, outside = result["predictions"]
        assert inside["calibrated"]
        low, high = inside["interval"]
        assert low <= inside["change"] <= high
        assert not outside["calibrated"], "three of 600 is far from the halves that were retrained"


def test_methods_are_compared_on_one_bank(trained: Loaded, evaluated: dict[str, Any]) -> None:
    service = trained.service
    fit = {"name": "retrained-trak", "model": "retrained", "dataset": "digits", "method": {"type": "trak"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    tune = {"dampings": [0.1, 1.0], "candidates": ["retrained-ekfac"]}
    body = {"queries": {"dataset": "test", "count": 30}, "protocol": PROTOCOL, "tune": tune}
    job = service.finished(service.post("/v1/indexes/retrained-trak/evaluations", body, 202))
    assert job["state"] == "succeeded", job["error"]
    methods = service.get("/v1/indexes/retrained-trak/quality")["quality"]["tuned"]["methods"]
    assert {entry["method"] for entry in methods} == {"trak", "ekfac"}
    assert methods[0]["lds_tuning_half"] >= methods[1]["lds_tuning_half"]
    refused = service.http.post(
        "/v1/indexes/retrained-trak/evaluations", json={**body, "tune": {"candidates": ["steady"]}}
    )
    assert refused.status_code in (404, 422)


def test_a_new_generation_has_no_quality_and_no_calibration(trained: Loaded, evaluated: dict[str, Any]) -> None:
    service, half = trained.service, {"remove": {"rows": list(range(0, 600, 2))}}
    fit = {"name": "renewed", "model": "retrained", "dataset": "digits", "method": {"type": "grad_dot"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    body = {"queries": {"dataset": "test", "count": 30}, "protocol": PROTOCOL}
    assert service.finished(service.post("/v1/indexes/renewed/evaluations", body, 202))["state"] == "succeeded"
    asked = {"queries": [{"dataset": "test", "rows": [3]}], "subsets": [half], "interval": 0.9}
    before = service.post("/v1/indexes/renewed/counterfactuals", asked)
    assert before["quality"] is not None
    assert before["results"][0]["predictions"][0]["calibrated"]
    assert service.finished(service.post("/v1/indexes/renewed/refresh", {}, 202))["state"] == "succeeded"
    after = service.post("/v1/indexes/renewed/counterfactuals", asked)
    assert after["quality"] is None
    assert not after["results"][0]["predictions"][0]["calibrated"]
    assert after["results"][0]["predictions"][0]["interval"] is None


def test_too_much_retraining_is_refused_with_its_hours(trained: Loaded) -> None:
    body = {"queries": {"dataset": "test"}, "protocol": {"subsets": 100_000, "seeds": 100}, "max_hours": 0.01}
    answer = trained.service.http.post("/v1/indexes/retrained-ekfac/evaluations", json=body)
    assert answer.status_code == 422
    assert "hours" in answer.json()["detail"]
    assert answer.json()["errors"][0]["pointer"] == "/max_hours"


@pytest.mark.parametrize(
    ("asked", "pointer"),
    [
        ({"protocol": {"subsets": 8, "alpha": 0.0001}}, "/protocol/alpha"),
        ({"deterministic": [0.9, 0.9999]}, "/deterministic/1"),
        ({"removal": {"top": [5, 600]}}, "/removal/top"),
        ({"mislabelled": UNKNOWN}, "/mislabelled"),
        ({"mislabelled": {"field": "row", "op": "lt", "value": 0}}, "/mislabelled"),
        ({"mislabelled": {"field": "row", "op": "gte", "value": 0}}, "/mislabelled"),
        ({"source": "nowhere"}, "/source"),
        ({"deterministic": [0.9, 0.9]}, "/deterministic"),
        ({"removal": {"top": [5, 5]}}, "/removal/top"),
        ({"tune": {"candidates": ["retrained-ekfac"]}}, "/tune/candidates/0"),
    ],
)
def test_an_evaluation_that_would_fail_after_retraining_is_refused(
    trained: Loaded, asked: dict[str, Any], pointer: str
) -> None:
    body = {"queries": {"dataset": "test", "count": 4}, "protocol": {"subsets": 8}, **asked}
    answer = trained.service.http.post("/v1/indexes/retrained-ekfac/evaluations", json=body)
    assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer])


def test_a_method_without_damping_is_not_tuned(trained: Loaded) -> None:
    fit = {"name": "undamped", "model": "retrained", "dataset": "digits", "method": {"type": "grad_dot"}}
    assert trained.service.finished(trained.service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    body = {"queries": {"dataset": "test", "count": 4}, "protocol": {"subsets": 8}, "tune": True}
    answer = trained.service.http.post("/v1/indexes/undamped/evaluations", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/tune")


def test_wrong_labels_are_not_looked_for_without_self_influence(trained: Loaded) -> None:
    fit = {"name": "retrained-datainf", "model": "retrained", "dataset": "digits", "method": {"type": "datainf"}}
    assert trained.service.finished(trained.service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    body = {"queries": {"dataset": "test", "count": 3}, "mislabelled": {"field": "row", "op": "lt", "value": 20}}
    answer = trained.service.http.post("/v1/indexes/retrained-datainf/evaluations", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/mislabelled")
