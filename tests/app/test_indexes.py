"""Indexes over HTTP: what they report, every method, store and search, and what is refused."""

import numpy as np
import pytest

from attribution_core.method_spec import METHODS, OFFERED
from attribution_core.spec import DatasetSpec
from tests.app.opened import directly
from tests.conftest import Loaded

QUERY = {"queries": [{"dataset": "test", "rows": [3, 8]}]}


def test_methods_are_described(loaded: Loaded) -> None:
    items = {item["type"]: item for item in loaded.service.get("/v1/methods")["items"]}
    assert set(items) == {*METHODS, "auto"}
    assert items["ekfac"]["estimators"] == ["additive", "newton"]
    assert items["grad_dot"]["estimators"] == ["additive"]
    assert items["representation"]["notion"] == "corroborative"
    for name, item in items.items():
        # Each method's own, not a neighbour's.
        assert item["parameters"] == OFFERED[name].model_json_schema()
        assert item["parameters"]["properties"]["type"]["const"] == name
    assert all(item["reference"] and item["needs"] for item in items.values())


def test_an_index_reports_what_it_is(steady: Loaded) -> None:
    index = steady.service.get("/v1/indexes/steady")
    assert index["status"] == "ready"
    assert index["coverage"]["percent"] == 100
    assert index["bytes"] > 600 * 256 * 4
    assert set(index["timings"]) >= {"covariance", "eigenvalues", "features", "total"}
    assert index["quality"] is None
    assert steady.service.get("/v1/indexes/steady/quality") == {"index": index["id"], "quality": None}


def test_an_index_of_some_layers_says_what_it_skipped(loaded: Loaded) -> None:
    job = loaded.fit("head", {"type": "grad_dot", "projection": {"dim": 64}}, layers=["output"])
    assert loaded.service.finished(job)["state"] == "succeeded"
    coverage = loaded.service.get("/v1/indexes/head")["coverage"]
    assert coverage["covered"] == ["output"]
    assert [skipped["name"] for skipped in coverage["skipped"]] == ["hidden_0"]
    assert coverage["percent"] == pytest.approx(100 * 170 / (170 + 16 * 785), abs=0.01)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "nothing"}, 404),
        ({"dataset": "nothing"}, 404),
        ({"name": "steady"}, 409),
        ({"checkpoints": []}, 422),
        ({"checkpoints": ["ckpt_nothing"]}, 422),
        ({"method": {"type": "magic"}}, 422),
        ({"method": {"type": "exact"}}, 422),
        ({"method": {"type": "representer"}, "layers": ["output"]}, 422),
        ({"method": {"type": "representer", "l2": 0}}, 422),
        ({"method": {"type": "ekfac", "damping": -1}}, 422),
        ({"method": {"type": "ekfac", "projection": {"dim": 10**9}}}, 422),
        ({"measurement": "happiness"}, 422),
        ({"layers": ["nothing"]}, 422),
        ({"layers": []}, 422),
        ({"layers": ["*", "!nothing.*"]}, 422),
        ({"precision": "float8"}, 422),
        ({"store": {"dtype": "int1"}}, 422),
        ({"store": {"dtype": "binary"}, "method": {"type": "trak"}}, 422),
        ({"method": {"type": "logra", "projection": {"type": "sjlt", "dim": 64}}}, 422),
        ({"search": {"type": "hnsw"}}, 422),
    ],
)
def test_impossible_indexes_are_refused(steady: Loaded, change: dict, status: int) -> None:
    body = {
        "name": "never",
        "model": "mlp",
        "dataset": "digits",
        "method": {"type": "grad_dot"},
        "measurement": "margin",
        **change,
    }
    answer = steady.service.http.post("/v1/indexes", json=body)
    assert answer.status_code == status, answer.text
    assert steady.service.http.get("/v1/indexes/never").status_code == 404


_TINY = {"type": "factored", "dim": 64}
FITTED = [
    ({"type": "kfac", "perturbation": {"copies": 2, "training": {"epochs": 2}}}, {}),
    ({"type": "diagonal"}, {}),
    ({"type": "gauss_newton", "curvature_examples": 50}, {}),
    ({"type": "datainf", "curvature_examples": 50}, {}),
    ({"type": "logra", "projection": _TINY}, {}),
    ({"type": "explicit", "damping": 10}, {"layers": ["output"]}),
    ({"type": "cg", "damping": 10, "curvature_examples": 50, "iterations": 3}, {"layers": ["output"]}),
    ({"type": "lissa", "damping": 10, "depth": 3, "batch": 20}, {"layers": ["output"]}),
    ({"type": "arnoldi", "damping": 10, "iterations": 4, "rank": 3}, {"layers": ["output"]}),
    ({"type": "trak", "projection": _TINY, "curvature": "fisher"}, {"layers": ["output"]}),
    ({"type": "grad_cos"}, {"store": {"dtype": "float16"}, "precision": "bfloat16", "layers": ["out*", "!hidden*"]}),
    ({"type": "representation"}, {}),
    ({"type": "representer", "l2": 0.1}, {}),
    ({"type": "grad_dot"}, {"search": {"type": "ivf", "lists": 8, "probes": 8}, "layers": ["output"]}),
]


def test_every_method_fits_and_answers(steady: Loaded) -> None:
    """One index each, submitted together; `ekfac` is the steady one, and `exact` is for models of one layer."""
    one_moment = {name for name, spec in METHODS.items() if spec.needs == ("checkpoints",)}
    assert {method["type"] for method, _ in FITTED} == one_moment - {"ekfac", "exact"}
    names = [f"other-{method['type'].replace('_', '-')}" for method, _ in FITTED]
    jobs = [steady.fit(name, method, **more) for name, (method, more) in zip(names, FITTED, strict=True)]
    for name, job, (method, _) in zip(names, jobs, FITTED, strict=True):
        finished = steady.service.finished(job)
        assert finished["state"] == "succeeded", (name, finished["error"])
        result = steady.service.post(f"/v1/indexes/{name}/attributions", QUERY)["results"][0]
        scores = [entry["score"] for entry in result["positive"]]
        assert scores == sorted(scores, reverse=True)
        assert scores[-1] > 0
        body = {**QUERY, "subsets": [{"remove": {"rows": [1, 2]}}], "estimator": "newton"}
        answer = steady.service.http.post(f"/v1/indexes/{name}/counterfactuals", json=body)
        if "newton" in METHODS[method["type"]].estimators:
            assert answer.status_code == 200, answer.text
        else:
            assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/estimator")
        own = steady.service.http.get(f"/v1/indexes/{name}/self-influence", params={"limit": 200})
        if METHODS[method["type"]].self_influence:
            assert len(own.json()["items"]) == 200, own.text
        else:
            assert own.status_code == 422, own.text
            assert "pass over the training set" in own.json()["detail"]
        assert steady.service.http.delete(f"/v1/indexes/{name}").status_code == 204
        assert steady.service.http.post(f"/v1/indexes/{name}/attributions", json=QUERY).status_code == 404


# `trak` answers by what a search of its rows finds; `grad_dot` scores candidates of both signs again.
_RADEMACHER = {"type": "rademacher", "dim": 64}
STORED = {
    "few-lists": ({"type": "trak", "projection": _RADEMACHER}, {"search": {"type": "ivf", "lists": 24, "probes": 4}}),
    "codes": (
        {"type": "trak", "projection": {"dim": 64}},
        {"store": {"dtype": "int8"}, "search": {"type": "ivfpq", "lists": 24, "probes": 6, "bits": 4}},
    ),
    "bits": (
        {"type": "grad_dot", "projection": _RADEMACHER},
        {"store": {"dtype": "binary"}, "search": {"type": "ivf", "lists": 24, "probes": 6}},
    ),
    "whitened-bits": ({"type": "ekfac"}, {"store": {"layout": "vectors"}}),
    "int8-factors": ({"type": "ekfac"}, {"store": {"dtype": "int8", "layout": "factors"}}),
}


def test_every_store_and_search_finds_what_a_scan_of_all_rows_finds(steady: Loaded) -> None:
    """Of both signs, though few lists are visited: those near the query hold few of the most negative examples."""
    jobs = [steady.fit(name, method, **more) for name, (method, more) in STORED.items()]
    asked = list(range(16))
    for name, job in zip(STORED, jobs, strict=True):
        finished = steady.service.finished(job)
        assert finished["state"] == "succeeded", (name, finished["error"])
        body = {"queries": [{"dataset": "test", "rows": asked}], "top_k": 10}
        answer = steady.service.post(f"/v1/indexes/{name}/attributions", body)
        assert answer["approximate"] is True
        index = directly(steady, name)
        dataset = steady.service.get("/v1/datasets/test")
        folder = steady.service.data / "artifacts" / "datasets" / dataset["id"]
        source = index.context.source_of(folder, DatasetSpec.model_validate(dataset["spec"]))
        scan = index.scores(index.query(source.batch(asked), None), np.arange(600), rescore=True)
        for sign, side in ((1, "positive"), (-1, "negative")):
            shares = []
            for scores, result in zip(scan, answer["results"], strict=True):
                rows = [entry["row"] for entry in result[side]]
                np.testing.assert_allclose(
                    [entry["score"] for entry in result[side]],
                    scores[rows],
                    rtol=1e-3,
                    atol=1e-6 * np.abs(scores).max(),
                )
                shares.append(np.isin(np.argsort(-sign * scores)[:10], rows).mean())
            assert np.mean(shares) > 0.85, (name, side, shares)
        assert steady.service.http.delete(f"/v1/indexes/{name}").status_code == 204


def test_auto_says_what_it_came_to_and_why(steady: Loaded) -> None:
    assert steady.service.finished(steady.fit("chosen", {"type": "auto"}))["state"] == "succeeded"
    index = steady.service.get("/v1/indexes/chosen")
    assert index["method"]["type"] == "gauss_newton"
    assert index["choice"]["asked"] == {"type": "auto", "l2": 0.0}
    assert [rung["method"] for rung in index["choice"]["considered"]] == ["exact", "explicit", "gauss_newton"]
    assert "shrunk" in index["choice"]["reason"]
    assert steady.service.get("/v1/indexes/steady")["choice"] is None
    answer = steady.service.post("/v1/indexes/chosen/attributions", QUERY)
    assert answer["method"] == "gauss_newton"
    assert 0 < answer["damping"] <= 10  # by parameters per example, as none was named
    body = {"forget": {"rows": [1, 2]}, "method": {"type": "newton"}, "run": "chosen"}
    job = steady.service.finished(steady.service.post("/v1/indexes/chosen/unlearned-checkpoints", body, 202))
    assert job["state"] == "succeeded", job["error"]
