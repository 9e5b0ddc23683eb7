"""What holds for every request: errors, ids, strict JSON, pages, idempotency, waiting."""

import asyncio
import base64
import errno
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import httpx2 as httpx
import pytest
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from sqlalchemy.exc import IntegrityError, OperationalError
from starlette.datastructures import FormData, UploadFile

from app.errors import Conflict, InvalidRequest, NotFound, StorageFull
from app.web import boundary
from app.web.boundary import _run, _waited
from app.web.effects import undo_on_error
from app.web.middleware import Observed
from app.web.problems import install
from app.web.strict_json import parse_strictly
from app.web.uploads import parsed_form, saved_file
from tests.conftest import MLP, Loaded
from tests.service import wait_for

QUERY = {"queries": [{"dataset": "test", "rows": [0]}]}
INDEX = {"name": "x", "model": "mlp", "dataset": "digits"}
WRONG = {"field": "label", "op": "like", "value": 3}


def is_problem(answer: httpx.Response, status: int, slug: str) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert set(body) == {"type", "title", "status", "detail", "errors", "request_id"}
    assert body["type"] == f"/problems/{slug}"
    assert body["status"] == status
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


def model(name: str) -> dict:
    return {"name": name, "architecture": MLP, "task": {"type": "classification"}}


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


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"name": "a", "name": "b"}',
        b'{"name": NaN}',
        b'{"name": Infinity}',
        b'{"name": 1e999}',
        b'{"name": 123456789012345678901234567890}',
        b'{"name": "a\\u0000b"}',
        b'{"name": "\\ud800"}',
        b'{"\\ud800": 1}',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        json.dumps({**model("x"), "colour": "red"}).encode(),
        json.dumps(model("../../etc/passwd")).encode(),
        json.dumps(model("A" * 65)).encode(),
        json.dumps(model("")).encode(),
        json.dumps({**model("x"), "name": True}).encode(),
    ],
    ids=range(21),
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/indexes", "/v1/datasets", "/v1/indexes/any/attributions"])
def test_malformed_bodies_are_refused(loaded: Loaded, path: str, body: bytes) -> None:
    for kind in ("application/json", "Application/Vnd.Any+JSON; charset=utf-8"):
        answer = loaded.service.http.post(path, content=body, headers={"content-type": kind})
        is_problem(answer, 422, "invalid-request")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([[]] * 500_001, "1,000,000 values"),
        ([{str(key): 1 for key in range(first, first + 60)} for first in range(2_000)], "100,000 keys"),
        ("é" * 500_000, None),
        ([0.5] * 900_000, None),
        ({"a, text": 'of "commas", [and] more' + "," * 1_100_000}, None),
        (["a, text", ",", [[]] * 500_001], "1,000,000 values"),
    ],
    ids=range(6),
)
def test_bodies_have_so_many_values_and_keys(value: Any, problem: str | None) -> None:
    body = json.dumps(value).encode()
    if problem is None:
        assert parse_strictly(body) == value
    else:
        with pytest.raises(InvalidRequest, match=problem):
            parse_strictly(body)


@pytest.mark.parametrize(
    "body", [b'"' + b'\\",' * 2_000_000, b'{"' + b"," * 4_000_000, b"," * 4_000_000 + b"\\"], ids=range(3)
)
def test_texts_that_never_end_are_refused_after_one_pass(body: bytes) -> None:
    """A second pass for each quote would take hours."""
    with pytest.raises(InvalidRequest):
        parse_strictly(body)


@pytest.mark.parametrize("size", [10, 300_000])
async def test_large_bodies_are_parsed_once_beside_other_requests(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def parse(body: bytes) -> Any:
        threads.append(threading.current_thread())
        return json.loads(body)

    monkeypatch.setattr(boundary, "parse_strictly", parse)
    receive = AsyncMock(return_value={"type": "http.request", "body": b'"' + b"x" * size + b'"'})
    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    await boundary._refuse_malformed_json(request)
    monkeypatch.setattr(json, "loads", None)
    assert await request.json() == "x" * size
    assert [thread is threading.current_thread() for thread in threads] == [size == 10]


def test_a_long_list_is_judged_by_its_first_wrong_entry(loaded: Loaded) -> None:
    wrong = {**QUERY, "subsets": [{"remove": {"rows": [1, "a"] * 20_000}}]}
    answer = loaded.service.http.post("/v1/indexes/none/counterfactuals", json=wrong)
    assert [entry["pointer"] for entry in is_problem(answer, 422, "invalid-request")["errors"]] == [
        "/subsets/0/remove/rows/1"
    ]


@pytest.mark.parametrize("text", ["a\\u0000", "\\ud800"])
def test_every_kind_of_json_is_parsed_strictly(loaded: Loaded, text: str) -> None:
    """FastAPI reads `+json` as JSON too, and Postgres refuses what it would let through."""
    body = json.dumps({**model("kind-of-json"), "metadata": {"a": "?"}}).replace("?", text)
    answer = loaded.service.http.post("/v1/models", content=body, headers={"content-type": "application/x+json"})
    assert is_problem(answer, 422, "invalid-request")["errors"][0]["pointer"] == "/metadata/a"


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


def test_too_large_and_wrong_kinds_of_bodies(loaded: Loaded) -> None:
    http = loaded.service.http
    is_problem(
        http.post("/v1/models", content=b" " * (9 << 20), headers={"content-type": "application/json"}),
        413,
        "payload-too-large",
    )
    is_problem(http.post("/v1/models/mlp/checkpoints", json={}), 415, "unsupported-media-type")
    is_problem(
        http.post("/v1/datasets", content="a,b", headers={"content-type": "text/csv"}), 415, "unsupported-media-type"
    )
    is_problem(http.get("/v1/models", headers={"host": "evil.example"}), 400, "bad-request")
    for kind in ("text/plain", "multipart/form-data; boundary=x"):  # an upload may be larger than what fits in memory
        answer = http.post("/v1/models", content=b"x" * (9 << 20), headers={"content-type": kind})
        is_problem(answer, 415, "unsupported-media-type")
    files = [(f"file-{number}", ("a.npz", b"")) for number in range(9)]
    is_problem(http.post("/v1/datasets", files=files, headers={"Idempotency-Key": "form"}), 422, "invalid-request")


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, StorageFull), (errno.EACCES, PermissionError)])
async def test_a_full_disk_is_told_to_who_uploads(tmp_path: Path, number: int, expected: type[Exception]) -> None:
    """Large forms are spooled to the disk while they are parsed, and then copied."""
    error = OSError(number, "refused")
    request = MagicMock(form=AsyncMock(side_effect=error))
    with pytest.raises(expected):
        await parsed_form(request)
    form = FormData([("file", UploadFile(MagicMock(seek=MagicMock(side_effect=error))))])
    with pytest.raises(expected):
        async with saved_file(form, tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_names_of_content_types_have_no_case(loaded: Loaded) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="spec"\r\n\r\n{}\r\n--x--\r\n'
    headers = {"content-type": "Multipart/Form-Data; boundary=x", "Idempotency-Key": "no-case"}
    answer = loaded.service.http.post("/v1/datasets", content=form, headers=headers)
    assert is_problem(answer, 422, "invalid-request")["errors"][0]["pointer"] == "/file"


def test_request_ids_are_kept_when_safe(loaded: Loaded) -> None:
    http = loaded.service.http
    assert http.get("/livez", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert http.get("/livez", headers={"x-request-id": "x" * 65}).headers["x-request-id"] != "x" * 65


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "!!!",
        "AAAA",
        base64.urlsafe_b64encode(b'["jobs", "zzz"]').decode(),
        base64.urlsafe_b64encode(b'["models", {}]').decode(),
        base64.urlsafe_b64encode(b'["models", 7]').decode(),
        base64.urlsafe_b64encode(b'["models", "a\\u0000"]').decode(),
        "A" * 513,
    ],
)
def test_hostile_cursors_are_refused(loaded: Loaded, cursor: str) -> None:
    answer = loaded.service.http.get("/v1/models", params={"cursor": cursor})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


def test_pages_walk_every_example_once(loaded: Loaded) -> None:
    rows, cursor = [], None
    while True:
        params = {"limit": 170} | ({"cursor": cursor} if cursor else {})
        page = loaded.service.http.get("/v1/datasets/digits/examples", params=params).json()
        rows += [item["row"] for item in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert rows == list(range(600))


def test_a_page_of_a_long_filter_has_a_next_one(loaded: Loaded) -> None:
    values = ["é" * 40, "ü" * 40, "vendor-1", "vendor-2", "vendor-3", "vendor-4"]
    params = {"limit": "1", "filter": json.dumps({"field": "source", "op": "in", "value": values})}
    first = loaded.service.http.get("/v1/datasets/digits/examples", params=params).json()
    params["cursor"] = first["next"]
    second = loaded.service.http.get("/v1/datasets/digits/examples", params=params)
    assert second.status_code == 200, second.text
    assert second.json()["items"][0]["row"] > first["items"][0]["row"]
    params["filter"] = json.dumps({"field": "source", "op": "in", "value": [*values, "vendor-5"]})
    is_problem(loaded.service.http.get("/v1/datasets/digits/examples", params=params), 422, "invalid-cursor")


def test_pages_of_models_are_stable_while_models_are_added(loaded: Loaded) -> None:
    service = loaded.service
    for number in range(3):
        service.post("/v1/models", model(f"page-{number}"), 201)
    first = service.http.get("/v1/models", params={"limit": 2}).json()
    service.post("/v1/models", model("page-later"), 201)
    second = service.http.get("/v1/models", params={"limit": 2, "cursor": first["next"]}).json()
    names = [item["name"] for item in first["items"] + second["items"]]
    assert names[:3] == ["page-2", "page-1", "page-0"]
    assert len(set(names)) == len(names)


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


def test_health_version_and_metrics(steady: Loaded) -> None:
    service = steady.service
    assert service.get("/livez") == {"status": "alive"}
    assert service.get("/readyz")["checks"] == {"database": "ok", "migrations": "ok", "storage": "ok", "engine": "ok"}
    assert service.get("/version")["api"] == "v1"
    service.post("/v1/indexes/steady/attributions", QUERY)
    text = service.http.get("/metrics").text
    assert 'headwater_requests_total{method="POST",route="/v1/indexes/{index}/attributions",status="200"}' in text
    assert "headwater_engine_seconds" in text


def test_logs_hold_no_bodies_and_no_secrets(loaded: Loaded) -> None:
    secret = "hw_verysecretkey_in_a_header"
    loaded.service.http.get("/v1/models", headers={"authorization": f"Bearer {secret}"})
    loaded.service.http.post("/v1/models", json={"name": "secret-in-a-body"})
    log = (loaded.service.data.parent / f"{loaded.service.data.name}.log").read_text()
    assert secret not in log
    assert "secret-in-a-body" not in log
    assert "route=/v1/models" in log


async def test_files_stay_where_a_commit_may_have_happened() -> None:
    """The connection was lost before the database's answer came: the row that names the files may be there."""
    undone: list[str] = []
    lost = OperationalError("COMMIT", {}, Exception("lost"))

    async def endpoint(request: Request) -> Response:
        undo_on_error(request, lambda: undone.append("file"))
        return Response(status_code=201)

    async def refused(request: Request) -> Response:
        await endpoint(request)
        raise Conflict("refused")

    request = Request({"type": "http"})
    session = AsyncMock(commit=AsyncMock(side_effect=lost))
    with pytest.raises(OperationalError):
        await _run(request, session, endpoint, None)
    assert not undone
    with pytest.raises(Conflict):
        await _run(request, session, refused, None)
    assert undone == ["file", "file"], "of both requests, which are one here"


@pytest.mark.parametrize("error", [OperationalError("SELECT", {}, Exception("lost")), NotFound("It was deleted.")])
async def test_who_waits_for_a_job_is_told_of_it_whatever_happens_meanwhile(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The job is there: an error would have the caller ask for it again."""
    monkeypatch.setattr(boundary, "finished", AsyncMock(side_effect=error))
    accepted = Response(status_code=202, headers={"location": "/v1/jobs/job_some"})
    request = Request({"type": "http", "headers": [(b"prefer", b"wait=5")]})
    assert await _waited(request, MagicMock(stopping=asyncio.Event()), accepted) is accepted


def test_a_client_that_goes_away_is_no_fault(loaded: Loaded) -> None:
    host, port = loaded.service.url.removeprefix("http://").split(":")
    head = "POST /v1/models HTTP/1.1\r\nhost: localhost\r\nx-request-id: gone-away\r\ncontent-length: 100\r\n\r\n{"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode())
        time.sleep(0.2)
    log = loaded.service.data.parent / f"{loaded.service.data.name}.log"
    wait_for(lambda: "request_id=gone-away" in log.read_text(), 10, "the request to be logged")
    assert "ClientDisconnect" not in log.read_text()


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


def test_metrics_count_methods_that_there_are(loaded: Loaded) -> None:
    for method in ("ABC", "DEF", "GET"):
        loaded.service.http.request(method, "/v1/models")
    metrics = loaded.service.http.get("/metrics").text
    counted = set(re.findall(r'headwater_requests_total\{method="(\w+)"', metrics))
    assert {"GET", "OTHER"} <= counted <= {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "OTHER"}


def test_a_race_that_no_service_foresaw_is_a_conflict() -> None:
    app = FastAPI()
    install(app)

    @app.post("/")
    async def race() -> None:
        raise IntegrityError("INSERT", {}, Exception("violates a foreign key"))

    answer = TestClient(app, raise_server_exceptions=False).post("/")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
