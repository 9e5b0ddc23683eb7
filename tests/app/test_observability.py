"""What operators see: health, metrics, logs and request ids."""

import re
import socket
import time

from tests.conftest import Loaded
from tests.service import wait_for

QUERY = {"queries": [{"dataset": "test", "rows": [0]}]}


def test_request_ids_are_kept_when_safe(loaded: Loaded) -> None:
    http = loaded.service.http
    assert http.get("/livez", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert http.get("/livez", headers={"x-request-id": "x" * 65}).headers["x-request-id"] != "x" * 65


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


def test_a_client_that_goes_away_is_no_fault(loaded: Loaded) -> None:
    host, port = loaded.service.url.removeprefix("http://").split(":")
    head = "POST /v1/models HTTP/1.1\r\nhost: localhost\r\nx-request-id: gone-away\r\ncontent-length: 100\r\n\r\n{"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode())
        time.sleep(0.2)
    log = loaded.service.data.parent / f"{loaded.service.data.name}.log"
    wait_for(lambda: "request_id=gone-away" in log.read_text(), 10, "the request to be logged")
    assert "ClientDisconnect" not in log.read_text()


def test_metrics_count_methods_that_there_are(loaded: Loaded) -> None:
    for method in ("ABC", "DEF", "GET"):
        loaded.service.http.request(method, "/v1/models")
    metrics = loaded.service.http.get("/metrics").text
    counted = set(re.findall(r'headwater_requests_total\{method="(\w+)"', metrics))
    assert {"GET", "OTHER"} <= counted <= {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "OTHER"}
