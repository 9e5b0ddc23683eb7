"""Bodies of requests: strict JSON, forms, their sizes and their kinds."""

import errno
import json
import threading
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from fastapi import Request
from starlette.datastructures import FormData, UploadFile

from app.errors import InvalidRequest, StorageFull
from app.web import boundary
from app.web.strict_json import parse_strictly
from app.web.uploads import parsed_form, saved_file
from tests.app.problems import is_problem
from tests.conftest import Loaded, model


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


@pytest.mark.parametrize("text", ["a\\u0000", "\\ud800"])
def test_every_kind_of_json_is_parsed_strictly(loaded: Loaded, text: str) -> None:
    """FastAPI reads `+json` as JSON too, and Postgres refuses what it would let through."""
    body = json.dumps({**model("kind-of-json"), "metadata": {"a": "?"}}).replace("?", text)
    answer = loaded.service.http.post("/v1/models", content=body, headers={"content-type": "application/x+json"})
    assert is_problem(answer, 422, "invalid-request")["errors"][0]["pointer"] == "/metadata/a"


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
