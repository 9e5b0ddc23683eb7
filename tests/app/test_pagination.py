"""Pages of lists: cursors, and that every item is on one."""

import base64
import json

import pytest

from tests.app.problems import is_problem
from tests.conftest import Loaded, model


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
