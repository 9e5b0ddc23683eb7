"""The contract's document, its pages, and that the api process stays small."""

import json
import re
import subprocess
import sys

import pytest

from tests.conftest import Loaded
from tests.service import ROOT

DOCUMENT = json.loads((ROOT / "openapi.json").read_text())
OPERATIONS = [
    (method, path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]  # fmt: skip
V1 = [entry for entry in OPERATIONS if entry[1].startswith("/v1/")]


def test_the_committed_document_is_the_services(loaded: Loaded) -> None:
    assert loaded.service.get("/openapi.json") == DOCUMENT, "run `make openapi`"


def test_every_operation_is_described(loaded: Loaded) -> None:
    assert len(V1) >= 30
    for _, path, operation in OPERATIONS:
        assert operation["summary"], path
        assert len(operation["description"]) > 20, path
    names = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(set(names)) == len(names)
    for method, path, operation in V1:
        assert {"400", "401", "403", "422", "500", "503"} <= set(operation["responses"]), (method, path)
        if "{" in path:
            assert "404" in operation["responses"], path
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert "application/problem+json" in response["content"], (path, status)


def schema_of(content: dict) -> dict:
    schema = content.get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    return DOCUMENT["components"]["schemas"].get(name, schema)


def test_every_posted_body_has_an_example() -> None:
    for _, path, operation in V1:
        if "requestBody" not in operation:
            continue
        content = operation["requestBody"]["content"]
        assert any("examples" in media for media in content.values()) or "examples" in schema_of(content), path


def test_the_api_process_imports_neither_torch_nor_faiss() -> None:
    code = (
        "import sys, app.main, app.cli; app.main.create_app(app.main.Settings(database={'url': 'postgresql://x@127.0.0.1/x'}))\n"
        "print([name for name in ('torch', 'faiss', 'transformers', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_pages_ask_no_other_host(loaded: Loaded, page: str) -> None:
    answer = loaded.service.http.get(page)
    assert answer.status_code == 200
    assert "http:" not in answer.text
    assert "https:" not in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', answer.text):
        assert loaded.service.http.get(path).status_code == 200, path


def test_every_endpoint_is_in_the_docs_table() -> None:
    table = (ROOT / "docs" / "endpoints.md").read_text()
    for method, path, _ in OPERATIONS:
        assert f"| `{method.upper()} {path}` |" in table, (method, path)
    for name in set(re.findall(r"`(tests/[\w/]+\.py)`", table)):
        assert (ROOT / name).exists(), name
