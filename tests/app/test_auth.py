"""API keys, scopes, and what a service without keys refuses."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from fastapi.routing import iter_route_contexts

from app.main import create_app
from app.settings import Settings
from tests.service import ROOT, Service, wait_for

OPEN = {"/livez", "/readyz", "/version", "/metrics", "/docs", "/redoc", "/openapi.json", "/static", None}
NEEDED = {
    ("GET", "/v1/models"): "read",
    ("POST", "/v1/models"): "write",
    ("DELETE", "/v1/models/x"): "write",
    ("POST", "/v1/indexes/x/attributions"): "query",
    ("GET", "/v1/indexes/x/self-influence"): "query",
    ("POST", "/v1/jobs/x/cancel"): "write",
}


def headwater(service: Service, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        cwd=ROOT,
        env=service.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, str]]]:
    """A service with one key per scope."""
    service = Service(tmp_path_factory.mktemp("closed") / "data").start()
    keys = {
        scope: headwater(service, "keys", "create", scope, "--scope", scope)
        for scope in ("read", "query", "write", "admin")
    }
    wait_for(lambda: service.http.get("/v1/models").status_code == 401, 10, "the first key to close the service")
    yield service, keys
    assert service.stop() == 0


def paths() -> list[tuple[str, str]]:
    app = create_app(Settings(database={"url": "postgresql://nobody@127.0.0.1:1/none"}))
    return sorted(
        (method, context.path)
        for context in iter_route_contexts(app.routes)
        for method in (context.methods or ())
        if context.path not in OPEN
    )


def test_every_route_but_the_open_ones_needs_a_key(closed: tuple[Service, dict[str, str]]) -> None:
    service, _ = closed
    every = paths()
    assert len(every) >= 30
    for method, path in every:
        assert path.startswith("/v1/"), path
        if method == "HEAD":
            continue
        answer = service.http.request(method, path.replace("{row}", "1"))
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["type"] == "/problems/unauthorized"


@pytest.mark.parametrize("scope", ["read", "query", "write", "admin"])
def test_a_key_may_do_what_its_scope_says(closed: tuple[Service, dict[str, str]], scope: str) -> None:
    service, keys = closed
    headers = {"authorization": f"Bearer {keys[scope]}"}
    for (method, path), needed in NEEDED.items():
        body = {} if method == "POST" else None
        status = service.http.request(method, path, headers=headers, json=body).status_code
        assert (status == 403) == (scope not in (needed, "admin")), (method, path, status)
    if scope in ("read", "admin"):
        assert service.http.get("/v1/me", headers=headers).json()["scopes"] == [scope]


def test_the_scope_is_asked_for_before_a_body_is_read(closed: tuple[Service, dict[str, str]]) -> None:
    service, keys = closed
    headers = {"authorization": f"Bearer {keys['read']}", "content-type": "application/json", "Idempotency-Key": "none"}
    assert service.http.post("/v1/models", headers=headers, content=b"{").status_code == 403
    headers["content-type"] = "multipart/form-data; boundary=x"
    assert service.http.post("/v1/datasets", headers=headers, content=b"no form").status_code == 403


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer x", "Basic abc", "Bearer hw_a_b", "Bearer hw__", "bearer \u00e9"]
)
def test_wrong_keys_are_refused_alike(closed: tuple[Service, dict[str, str]], header: str) -> None:
    service, keys = closed
    answer = service.http.get("/v1/models", headers={"authorization": header.encode("latin-1")})
    assert answer.status_code == 401
    almost = keys["read"][:-1] + ("a" if keys["read"][-1] != "a" else "b")
    assert service.http.get("/v1/models", headers={"authorization": f"Bearer {almost}"}).status_code == 401


def test_two_authorization_headers_are_refused(closed: tuple[Service, dict[str, str]]) -> None:
    service, keys = closed
    headers = [("authorization", f"Bearer {keys['read']}"), ("authorization", "Bearer other")]
    assert service.http.get("/v1/models", headers=headers).status_code == 401


def test_a_revoked_key_stops_working_and_the_service_stays_closed(closed: tuple[Service, dict[str, str]]) -> None:
    service, _ = closed
    key = headwater(service, "keys", "create", "brief", "--scope", "read")
    headers = {"authorization": f"Bearer {key}"}
    assert service.http.get("/v1/models", headers=headers).status_code == 200
    headwater(service, "keys", "revoke", "brief")
    wait_for(lambda: service.http.get("/v1/models", headers=headers).status_code == 401, 15, "the key to stop working")
    listed = headwater(service, "keys", "list")
    assert "brief\tread\trevoked" in listed
    assert key not in listed
    assert key.rsplit("_", 1)[1] not in listed


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a" * 65])
def test_keys_have_names(closed: tuple[Service, dict[str, str]], name: str) -> None:
    service, _ = closed
    command = [sys.executable, "-m", "app.cli", "keys", "create", name]
    done = subprocess.run(
        command, cwd=ROOT, env=service.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "printable" in done.stderr


def test_secrets_are_not_stored(closed: tuple[Service, dict[str, str]]) -> None:
    service, keys = closed
    secret = keys["read"].split("_", 2)[2].encode()
    folder = service.data / "postgres" / "base"
    assert not any(
        secret in path.read_bytes() for path in folder.rglob("*") if path.is_file() and os.access(path, os.R_OK)
    )


def test_without_keys_only_loopback_is_served(tmp_path: Path) -> None:
    environment = {**os.environ, "HEADWATER_DATA_DIR": str(tmp_path / "data")}
    command = [sys.executable, "-m", "app.cli", "serve", "--host", "0.0.0.0", "--port", "8599"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Refusing to listen on 0.0.0.0 without API keys" in done.stderr


def test_one_data_folder_serves_one_service(closed: tuple[Service, dict[str, str]]) -> None:
    service, _ = closed
    command = [sys.executable, "-m", "app.cli", "serve", "--port", "8598"]
    done = subprocess.run(
        command, cwd=ROOT, env=service.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Another `headwater serve` uses" in done.stderr


def test_host_headers_are_checked(closed: tuple[Service, dict[str, str]]) -> None:
    service, _ = closed
    with httpx.Client(base_url=service.url) as http:
        assert http.get("/livez", headers={"host": "attacker.example"}).status_code == 400
