"""A small client of the service: requests, jobs with a progress bar, and errors that say what was wrong.

Nothing here is specific to the demo; copy it as a start for a client of your own.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Json = dict[str, Any]
TERMINAL = {"succeeded", "failed", "cancelled"}


class ServiceError(Exception):
    """The service refused a request, or a job failed."""


class Client:
    """Talks to one Headwater service."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=120)

    def request(self, method: str, path: str, **options: Any) -> Json:
        """Return the JSON answer.

        Raises:
            ServiceError: with the problem's detail, if the answer is an error.
        """
        answer = self.http.request(method, path, **options)
        if answer.is_error:
            problem = answer.json()
            raise ServiceError(f"{method} {path}: {problem['title']}: {problem['detail']} {problem['errors']}")
        return answer.json()  # type: ignore[no-any-return]

    def get(self, path: str) -> Json:
        """Return the resource at `path`."""
        return self.request("GET", path)

    def post(self, path: str, body: Json) -> Json:
        """Post a JSON body."""
        return self.request("POST", path, json=body)

    def upload(self, path: str, file: Path, **parts: Json) -> Json:
        """Post a file beside JSON parts as multipart form data."""
        with file.open("rb") as stream:
            data = {name: json.dumps(value) for name, value in parts.items()}
            return self.request("POST", path, data=data, files={"file": (file.name, stream)})

    def find(self, path: str) -> Json | None:
        """Return the resource at `path`, or None if there is none."""
        answer = self.http.get(path)
        return None if answer.status_code == 404 else self.request("GET", path)

    def finish(self, job: Json, label: str) -> Json:
        """Wait for a job, showing its progress, rate and remaining time.

        Raises:
            ServiceError: if the job does not succeed.
        """
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[eta]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns) as bar:
            task = bar.add_task(label, total=None, rate="", eta="")
            while True:
                job = self.get(f"/v1/jobs/{job['id']}")
                bar.update(task, **_shown(job["progress"]))
                if job["state"] in TERMINAL:
                    break
                time.sleep(0.3)
        if job["state"] != "succeeded":
            raise ServiceError(f"{label} {job['state']}: {job['error']}")
        return job

    def ensure(self, path: str, name: str, create: Callable[[], Json], label: str) -> Json:
        """Return the named resource, creating it (and waiting for its job) if it does not exist."""
        found = self.find(f"{path}/{name}")
        if found is None:
            created = create()
            if created["id"].startswith("job_"):
                self.finish(created, label)
        elif found.get("job") and found["status"] not in ("ready", "failed"):
            self.finish(self.get(f"/v1/jobs/{found['job']}"), label)
        return self.get(f"{path}/{name}")


def _shown(progress: Json) -> Json:
    rate, eta, unit = progress["rate"], progress["eta_seconds"], progress["unit"]
    return {
        "completed": progress["done"],
        "total": progress["total"],
        "rate": f"{rate:,.0f} {unit}/s" if rate else "",
        "eta": f"{eta:.0f} s left" if eta else "",
    }
