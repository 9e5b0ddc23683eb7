"""A real service for end-to-end tests: api, engine, worker and Postgres as processes of their own."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

ROOT = Path(__file__).parents[1]
TERMINAL = {"succeeded", "failed", "cancelled"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 60, message: str = "condition") -> Any:
    """Poll until `condition` returns something true."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"gave up waiting for {message}"
        time.sleep(0.05)


class Service:
    """`headwater serve` on a free port over a data folder of its own."""

    def __init__(self, data: Path, **environment: str) -> None:
        self.data = data
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.environment = {
            **os.environ,
            "HEADWATER_DATA_DIR": str(data),
            "HEADWATER_WORKER__LEASE_SECONDS": "2",
            "HEADWATER_WORKER__THREADS": "1",
            "HEADWATER_ENGINE__THREADS": "1",
            **environment,
        }
        self.command = [sys.executable, "-m", "app.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def start(self) -> "Service":
        self.data.mkdir(parents=True, exist_ok=True)
        self.log = (self.data.parent / f"{self.data.name}.log").open("ab")
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        wait_for(self.ready, 90, f"the service; log: {self.log.name}")
        return self

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(timeout=40)
        self.http.close()
        self.log.close()
        return code

    def ready(self) -> bool:
        assert self.process.poll() is None, f"the service exited; log: {self.log.name}"
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def child(self, module: str) -> psutil.Process | None:
        """The running process of ours that was started as `python -m module`."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if module in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def upload(self, path: str, file: Path, status: int, **parts: Any) -> Any:
        data = {name: json.dumps(value) for name, value in parts.items()}
        with file.open("rb") as stream:
            answer = self.http.post(path, data=data, files={"file": (file.name, stream)})
        assert answer.status_code == status, answer.text
        return answer.json()

    def finished(self, job: Any, seconds: float = 180) -> Any:
        def done() -> Any:
            found = self.get(f"/v1/jobs/{job['id']}")
            return found if found["state"] in TERMINAL else None

        return wait_for(done, seconds, f"job {job['id']}")
