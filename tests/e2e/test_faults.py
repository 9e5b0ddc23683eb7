"""What the service survives: processes killed with -9 at random moments, and its database restarted."""

import json
import random
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import psutil

from attribution_core.fingerprint import sha256_file
from tests.conftest import MLP, Loaded
from tests.service import Service, wait_for

EKFAC = {"type": "ekfac", "projection": {"dim": 256}}
RECIPE = {
    "optimizer": {"type": "sgd", "momentum": 0.9},
    "learning_rate": 0.05,
    "epochs": 6,
    "batch_size": 50,
}
QUERY = {"queries": [{"dataset": "test", "rows": [3]}], "top_k": 5}


def artifact_hashes(service: Service, index: str) -> dict[str, str]:
    folder = service.data / "artifacts" / "indexes" / service.get(f"/v1/indexes/{index}")["id"]
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def kill(service: Service, module: str) -> None:
    process = wait_for(lambda: service.child(module), message=module)
    process.kill()
    process.wait(10)


def test_worker_killed_at_ten_random_moments_leaves_the_same_bytes(fragile: Loaded) -> None:
    service, moments = fragile.service, random.Random(7)
    job = fragile.fit("undisturbed", EKFAC)
    began = time.monotonic()
    assert service.finished(job)["state"] == "succeeded"
    usual = time.monotonic() - began
    expected = artifact_hashes(service, "undisturbed")
    assert len(expected) >= 3

    job, kills = fragile.fit("disturbed", EKFAC), 0
    while kills < 10 and service.get(f"/v1/jobs/{job['id']}")["state"] not in ("succeeded", "failed"):
        time.sleep(moments.uniform(0.0, usual / 4))
        kill(service, "app.worker.main")
        kills += 1
    finished = service.finished(job)
    assert finished["state"] == "succeeded", finished["error"]
    assert kills >= 3
    assert artifact_hashes(service, "disturbed") == expected
    for round_ in range(kills, 10):
        job = fragile.fit(f"disturbed-{round_}", EKFAC)
        time.sleep(moments.uniform(0.0, usual))
        kill(service, "app.worker.main")
        assert service.finished(job)["state"] == "succeeded"
        assert artifact_hashes(service, f"disturbed-{round_}") == expected


def test_a_bank_has_every_retraining_once_however_often_the_worker_is_killed(fragile: Loaded) -> None:
    service, moments = fragile.service, random.Random(11)
    body = {"name": "replayed", "architecture": MLP, "task": {"type": "classification"}, "recipe": RECIPE}
    service.post("/v1/models", body, 201)
    job = service.post("/v1/models/replayed/trainings", {"dataset": "digits"}, 202)
    assert service.finished(job)["state"] == "succeeded"
    fit = {"name": "replayed", "model": "replayed", "dataset": "digits", "method": {"type": "grad_dot"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    evaluation = {"queries": {"dataset": "test"}, "protocol": {"subsets": 96}}

    def evaluated(kills: int) -> tuple[dict, dict]:
        job = service.post("/v1/indexes/replayed/evaluations", evaluation, 202)
        for _ in range(kills):
            time.sleep(moments.uniform(0.5, 3))
            kill(service, "app.worker.main")
        finished = service.finished(job)
        assert finished["state"] == "succeeded", finished["error"]
        (bank,) = service.get("/v1/banks")["items"]
        return service.get("/v1/indexes/replayed/evaluations")["items"][0]["quality"], bank

    disturbed, bank = evaluated(kills=4)
    assert bank["retrainings"] == 96
    assert service.http.delete(f"/v1/banks/{bank['id']}").status_code == 204
    undisturbed, again = evaluated(kills=0)
    assert again["retrainings"] == 96
    assert disturbed == undisturbed


class Load:
    """Asks the same question from several threads until told to stop, and counts what comes back."""

    def __init__(self, service: Service, index: str, threads: int = 4) -> None:
        self.url, self.path = service.url, f"/v1/indexes/{index}/attributions"
        self.statuses: Counter[int] = Counter()
        self.unexpected: list[str] = []
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.stopping.is_set():
                answer = http.post(self.path, json=QUERY)
                self.statuses[answer.status_code] += 1
                if answer.status_code != 200:
                    self._check_refusal(answer)
                    time.sleep(0.05)

    def _check_refusal(self, answer: httpx.Response) -> None:
        told = answer.headers.get("content-type") == "application/problem+json" and "retry-after" in answer.headers
        if answer.status_code not in (429, 503) or not told:
            self.unexpected.append(f"{answer.status_code} {answer.text}")


def ready_index(fragile: Loaded) -> str:
    if fragile.service.http.get("/v1/indexes/steady").status_code == 404:
        assert fragile.service.finished(fragile.fit("steady", {"type": "grad_dot"}))["state"] == "succeeded"
    return "steady"


def answered(load: Load, more: int) -> None:
    goal = load.statuses[200] + more
    wait_for(
        lambda: load.statuses[200] >= goal, 60, f"{more} more answers; so far {load.statuses} {load.unexpected[:3]}"
    )


def test_engine_killed_under_load_is_replaced(fragile: Loaded) -> None:
    service = fragile.service
    index = ready_index(fragile)
    expected = service.post(f"/v1/indexes/{index}/attributions", QUERY)["results"]
    with Load(service, index) as load:
        for _ in range(3):
            answered(load, 10)
            kill(service, "app.engine.process")
            answered(load, 10)
    assert not load.unexpected
    assert set(load.statuses) <= {200, 429, 503}
    assert service.post(f"/v1/indexes/{index}/attributions", QUERY)["results"] == expected


def test_a_service_that_is_told_to_end_answers_whoever_waits(tmp_path: Path) -> None:
    """Followers and preferred waits end at the signal, and the worker beside them: a queued job is done by the next service."""
    service = Service(tmp_path / "data").start()
    worker = wait_for(lambda: service.child("app.worker.main"), message="the worker")
    worker.suspend()
    (tmp_path / "rows.csv").write_text("a,label\n1,0\n")
    spec = {"name": "rows", "kind": "tabular", "input": ["a"], "target": "label"}
    job = service.upload("/v1/datasets", tmp_path / "rows.csv", 202, spec=spec)
    more = {"data": {"spec": json.dumps({**spec, "name": "more"})}, "headers": {"Prefer": "wait=60"}}
    with ThreadPoolExecutor() as pool, httpx.stream("GET", f"{service.url}/v1/jobs/{job['id']}/events") as followed:
        waited = pool.submit(
            lambda: service.http.post("/v1/datasets", files={"file": ("a.csv", b"a,label\n1,0\n")}, **more)
        )
        wait_for(lambda: len(service.get("/v1/jobs")["items"]) == 2, message="the second job")
        service.process.terminate()
        worker.resume()
        began = time.monotonic()
        assert waited.result().status_code == 202
        assert followed.read().endswith(b"retry: 1000\n\n")
        assert service.stop() == 0
    assert time.monotonic() - began < 15


def postgres_of(service: Service) -> tuple[int, Path]:
    folder = service.data / "postgres"
    return int((folder / "postmaster.pid").read_text().splitlines()[0]), folder


def restart_postgres(service: Service) -> None:
    """Stop the embedded server at once, as a crash would, and start it again with its own command line."""
    pid, folder = postgres_of(service)
    server = psutil.Process(pid)
    command, owner = server.cmdline(), server.username()
    subprocess.run(["kill", "-QUIT", str(pid)], check=True)
    server.wait(30)
    time.sleep(1.5)
    with (folder / "restart.log").open("ab") as log:
        subprocess.run(["setsid", "--fork", *command], user=owner, stdout=log, stderr=log, cwd=folder, check=True)


def test_postgres_restarted_under_load_loses_nothing(fragile: Loaded) -> None:
    service = fragile.service
    index = ready_index(fragile)
    api = service.process.pid
    job = fragile.fit("through-the-restart", EKFAC)
    with Load(service, index) as load:
        answered(load, 10)
        restart_postgres(service)
        wait_for(service.ready, 10, "the api to be healthy again")
        answered(load, 20)
    assert not load.unexpected
    assert set(load.statuses) <= {200, 429, 503}
    assert service.process.pid == api
    assert service.finished(job)["state"] == "succeeded"
    assert service.post("/v1/indexes/through-the-restart/attributions", QUERY)["results"]
