"""Refusals and faults are problem documents, with pointers into what was sent."""

from typing import Any

import pytest
import structlog
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.exc import IntegrityError

from app.web.middleware import Observed
from app.web.problems import install
from tests.app.problems import is_problem
from tests.conftest import Loaded, model

QUERY = {"queries": [{"dataset": "test", "rows": [0]}]}
INDEX = {"name": "x", "model": "mlp", "dataset": "digits"}
WRONG = {"field": "label", "op": "like", "value": 3}


@pytest.mark.parametrize(
    ("method", "path", "status", "slug"),
    [
        ("GET", "/v1/nothing", 404, "not-found"),
        ("GET", "/v1/models/nothing", 404, "not-found"),
        ("GET", "/v1/jobs/job_00000000000000000000000000", 404, "not-found"),
        ("GET", "/v1/datasets/%00", 404, "not-found"),
        ("GET", "/v1/datasets/..%2f..%2fetc%2fpasswd", 404, "not-found"),
        ("PUT", "/v1/models", 405, "method-not-allowed"),
        ("GET", "/v1/models?colour=red", 422, "invalid-request"),
        ("GET", "/v1/models?limit=0", 422, "invalid-request"),
        ("GET", "/v1/models?limit=1000000000", 422, "invalid-request"),
        ("GET", "/v1/models?limit=NaN", 422, "invalid-request"),
        ("GET", "/v1/jobs?state=sleeping", 422, "invalid-request"),
        ("GET", "/v1/datasets/digits/examples/600", 404, "not-found"),
        ("GET", "/v1/datasets/digits/examples/-1", 422, "invalid-request"),
        ("GET", "/v1/datasets/digits/examples?filter=%7B%7D", 422, "invalid-request"),
        ("GET", "/v1/datasets/digits/examples?filter=%5B%5B%5B", 422, "invalid-request"),
    ],
)
def test_refusals_are_problems(loaded: Loaded, method: str, path: str, status: int, slug: str) -> None:
    is_problem(loaded.service.http.request(method, path), status, slug)


def test_a_long_list_is_judged_by_its_first_wrong_entry(loaded: Loaded) -> None:
    wrong = {**QUERY, "subsets": [{"remove": {"rows": [1, "a"] * 20_000}}]}
    answer = loaded.service.http.post("/v1/indexes/none/counterfactuals", json=wrong)
    assert [entry["pointer"] for entry in is_problem(answer, 422, "invalid-request")["errors"]] == [
        "/subsets/0/remove/rows/1"
    ]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/models", [], [""]),
        ("/v1/models", {**model("x"), "task": {"type": "causal_lm", "reduction": "most"}}, ["/task/reduction"]),
        ("/v1/models", {**model("x"), "a/b~": 1}, ["/a~1b~0"]),
        ("/v1/models", {**model("x"), "b" * 300: 1}, [""]),
        ("/v1/models", {**model("x"), "architecture": {"name": "mlp", "arguments": {"a/b": 1}}}, ["/architecture/arguments/input_dim"]),
        ("/v1/models", {**model("x"), "architecture": {"name": "mlp"}}, ["/architecture/arguments"]),
        ("/v1/datasets", {"name": "x", "kind": "tensor", "source": "a:b", "input": ["a", ""]}, ["/input", "/input/1"]),
        ("/v1/indexes", {**INDEX, "method": {"type": "ekfac", "fisher": "nope"}}, ["/method/fisher"]),
        ("/v1/indexes", {**INDEX, "method": {"type": "posterior"}}, ["/method/prior", "/method/queries"]),
        ("/v1/indexes", {**INDEX, "method": {"type": "none"}}, ["/method"]),
        ("/v1/indexes", {**INDEX, "method": {"type": "ekfac"}, "checkpoints": ["final", 3]}, ["/checkpoints", "/checkpoints/1"]),
        ("/v1/indexes/none/attributions", {**QUERY, "filter": {"and": [{"not": WRONG}]}}, ["/filter/and/0/not/op"]),
        ("/v1/indexes/none/attributions", {"queries": [{"example": {"target": [1, "x"]}}]},
         ["/queries/0/example/input", "/queries/0/example/target", "/queries/0/example/target/1"]),
        ("/v1/indexes/none/counterfactuals", {**QUERY, "subsets": [{"remove": {"where": WRONG}}, {"keep": {}}, {}]},
         ["/subsets/0/remove/where/op", "/subsets/1/keep", "/subsets/2"]),
        ("/v1/indexes/none/unlearning", {**QUERY, "forget": {"where": {"or": [3]}}}, ["/forget/where/or/0"]),
        ("/v1/indexes/none/evaluations", {"queries": {"dataset": "test"}, "tune": {"a": 1}}, ["/tune/a"]),
        ("/v1/indexes/none/evaluations", {"queries": {"dataset": "test"}, "tune": 3}, ["/tune"]),
    ],
    ids=range(17),
)  # fmt: skip
def test_pointers_lead_into_the_body_that_was_sent(loaded: Loaded, path: str, body: Any, expected: list[str]) -> None:
    problem = is_problem(loaded.service.http.post(path, json=body), 422, "invalid-request")
    found = [(entry["pointer"], entry["detail"]) for entry in problem["errors"]]
    assert list(dict.fromkeys(pointer for pointer, _ in found)) == expected
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "change",
    [
        {"task": {"type": "A" * 100_000}},
        {"architecture": {"name": "hf_causal_lm", "arguments": {"config": {"model_type": "A" * 100_000}}}, "task": {"type": "causal_lm"}},
        {"A" * 100_000: 1},
    ],
    ids=range(3),
)  # fmt: skip
def test_what_was_sent_is_not_repeated_at_length(loaded: Loaded, change: dict) -> None:
    answer = loaded.service.http.post("/v1/models", json={**model("x"), **change})
    is_problem(answer, 422, "invalid-request")
    assert len(answer.content) < 10_000


@pytest.mark.parametrize(
    ("path", "part", "text", "expected"),
    [
        ("/v1/datasets", "spec", '{"name": "x", "kind": "tensor", "shape": [1, 0]}', ["/spec/shape/1"]),
        ("/v1/datasets", "spec", '{"name": "x"}', ["/spec/kind"]),
        ("/v1/datasets", "spec", '{"name": "x", "kind": "tensor", "metadata": ["a", "\\u0000"]}', ["/spec/metadata/1"]),
        ("/v1/models/mlp/checkpoints", "meta", '{"run": "a", "step": -1}', ["/meta/step"]),
        ("/v1/models/mlp/checkpoints", "meta", "[]", ["/meta"]),
        ("/v1/datasets", "a/b", "1", ["/a~1b", "/spec"]),
    ],
    ids=range(6),
)
def test_pointers_lead_into_the_parts_of_a_form(
    loaded: Loaded, path: str, part: str, text: str, expected: list[str]
) -> None:
    answer = loaded.service.http.post(path, data={part: text}, files={"file": ("a.npz", b"nothing")})
    assert [entry["pointer"] for entry in is_problem(answer, 422, "invalid-request")["errors"]] == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/models?limit=0", ["/query/limit"]),
        ("/v1/models?a/b=1", ["/query/a~1b"]),
        ("/v1/datasets/digits/examples/-1", ["/path/row"]),
        ('/v1/datasets/digits/examples?filter={"field":"nothing","op":"eq","value":1}', ["/query/filter"]),
        ('/v1/datasets/digits/examples?filter={"field":"target","op":"eq","value":NaN}', ["/query/filter"]),
        ('/v1/datasets/digits/examples?filter={"field":"target","op":"eq","value":"\\u0000"}', ["/query/filter"]),
    ],
)
def test_pointers_name_parameters(loaded: Loaded, path: str, expected: list[str]) -> None:
    problem = is_problem(loaded.service.http.get(path), 422, "invalid-request")
    assert [entry["pointer"] for entry in problem["errors"]] == expected


def test_what_nobody_foresaw_is_answered_once_and_logged_once() -> None:
    """An exception that reached the server would be logged by it too, and would close the connection without a word."""
    app = FastAPI()
    install(app)
    app.add_middleware(Observed)

    @app.get("/")
    async def fail() -> None:
        raise ZeroDivisionError("nobody foresaw it")

    with structlog.testing.capture_logs() as logs:
        answer = TestClient(app).get("/", headers={"x-request-id": "unforeseen"})
    assert answer.headers["x-request-id"] == is_problem(answer, 500, "internal")["request_id"] == "unforeseen"
    assert [entry["event"] for entry in logs] == ["unhandled error", "request"]
    assert logs[1]["status"] == 500


def test_a_race_that_no_service_foresaw_is_a_conflict() -> None:
    app = FastAPI()
    install(app)

    @app.post("/")
    async def race() -> None:
        raise IntegrityError("INSERT", {}, Exception("violates a foreign key"))

    answer = TestClient(app, raise_server_exceptions=False).post("/")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
