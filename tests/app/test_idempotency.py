"""Requests that are repeated with their idempotency key."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx

from tests.app.problems import is_problem
from tests.conftest import Loaded, model


def test_a_repeated_post_is_answered_again(loaded: Loaded) -> None:
    http = loaded.service.http
    headers = {"Idempotency-Key": "model-once"}
    first = http.post("/v1/models", json=model("once"), headers=headers)
    again = http.post("/v1/models", json=model("once"), headers=headers)
    assert first.status_code == again.status_code == 201
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    is_problem(http.post("/v1/models", json=model("other"), headers=headers), 422, "idempotency-mismatch")
    is_problem(http.post("/v1/models", json=model("once"), headers={"Idempotency-Key": ""}), 422, "invalid-request")


def test_a_repeated_post_waits_as_the_first_did(loaded: Loaded) -> None:
    spec = {"name": "waited-twice", "kind": "tabular", "input": ["a"], "target": "label"}
    for wait in ("wait=0", "wait=30", "wait=30"):
        answer = loaded.service.http.post(
            "/v1/datasets",
            data={"spec": json.dumps(spec)},
            files={"file": ("a.csv", b"a,label\n1,0\n")},
            headers={"Idempotency-Key": "waited-twice", "Prefer": wait},
        )
        assert answer.status_code == (202 if wait == "wait=0" else 200)
        assert answer.headers.get("idempotent-replayed", "false") == ("false" if wait == "wait=0" else "true")
    assert answer.json()["status"] == "ready"


def test_a_refused_request_does_not_hold_its_key(loaded: Loaded) -> None:
    http = loaded.service.http
    headers = {"Idempotency-Key": "after-refusal"}
    bad = {**model("after-refusal"), "task": {"type": "causal_lm"}}
    is_problem(http.post("/v1/models", json=bad, headers=headers), 422, "invalid-request")
    assert http.post("/v1/models", json=model("after-refusal"), headers=headers).status_code == 201


def test_fifty_posts_with_one_key_make_one_model(loaded: Loaded) -> None:
    def post(_: int) -> tuple[int, str]:
        with httpx.Client(base_url=loaded.service.url, timeout=60) as http:
            answer = http.post("/v1/models", json=model("fifty"), headers={"Idempotency-Key": "fifty"})
            return answer.status_code, answer.json().get("id") or answer.json()["type"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(post, range(50)))
    assert {status for status, _ in answers} <= {201, 409}
    assert len({found for status, found in answers if status == 201}) == 1
    assert {found for status, found in answers if status == 409} <= {"/problems/idempotency-in-flight"}
