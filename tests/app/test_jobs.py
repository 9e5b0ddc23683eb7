"""Jobs over HTTP: events that can be resumed, cancellation, retry."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import cast
from unittest.mock import MagicMock

import pytest

from app import supervisor
from app.db.session import SessionMaker
from app.db.tables import JobEvent
from app.jobs import service as jobs
from app.jobs.following import Following
from app.storage.artifacts import ArtifactStore
from app.worker.main import _parent_gone
from app.worker.progress import JobProgress
from attribution_core.errors import CorruptArtifactError
from tests.conftest import Loaded
from tests.service import wait_for

SLOW = {"type": "ekfac", "projection": {"type": "gaussian", "dim": 4096}}


def events(loaded: Loaded, job: str, last: str | None = None) -> list[dict]:
    headers = {"Last-Event-ID": last} if last else {}
    found: list[dict] = []
    with loaded.service.http.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        event: dict = {}
        for line in answer.iter_lines():
            if line.startswith(("id:", "event:", "data:")):
                key, _, value = line.partition(":")
                event[key] = value.strip()
            elif not line and "data" in event:
                found.append({**event, "data": json.loads(event["data"])})
                event = {}
    return found


def test_events_tell_the_whole_story_and_resume(loaded: Loaded) -> None:
    job = loaded.fit("with-events", {"type": "grad_dot"})
    found = events(loaded, job["id"])
    states = [event["data"]["state"] for event in found if event["event"] == "state"]
    assert (states[0], states[-1]) == ("queued", "succeeded")
    assert "running" in states
    ids = [int(event["id"]) for event in found]
    assert ids == sorted(set(ids))
    assert events(loaded, job["id"], last=found[1]["id"]) == found[2:]
    ended = loaded.service.http.get(f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": found[-1]["id"]})
    assert (ended.status_code, ended.content) == (204, b"")
    final = loaded.service.get(f"/v1/jobs/{job['id']}")
    assert final["progress"]["done"] == final["progress"]["total"] == 600
    for wrong in ("x", "-1", "1e3", "9" * 30):
        answer = loaded.service.http.get(f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": wrong})
        assert answer.status_code == 422


async def test_followers_of_one_job_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a connection for each, a hundred of them would leave none for requests."""
    reads: list[tuple[str, int]] = []

    async def read(session: object, job: str, after: int) -> list[JobEvent]:
        reads.append((job, after))
        await asyncio.sleep(0.01)
        if job == "lost":
            raise OSError("the database is lost")
        return [JobEvent(id=after + 1, job_id=job, type="state", data={})]

    monkeypatch.setattr(jobs, "events", read)
    following = Following(cast(SessionMaker, MagicMock()))
    asked = [following.news(job, 0) for job in ("one", "other") for _ in range(50)]
    first, *rest = [asyncio.create_task(question) for question in asked]
    await asyncio.sleep(0)
    first.cancel()
    news = await asyncio.gather(*rest)
    assert [one.events[0].job_id for one in news] == ["one"] * 49 + ["other"] * 50
    assert reads == [("one", 0), ("other", 0)]
    for _ in range(2):
        with pytest.raises(OSError, match="lost"):
            await following.news("lost", 0)
    await following.news("one", 1)
    assert reads[2:] == [("lost", 0), ("lost", 0), ("one", 1)]


def test_units_that_were_finished_before_are_no_work_of_this_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = JobProgress()
    progress.restart(9_000)
    for moment in (101.0, 102.0):
        now = moment
        progress.advance(10)
        assert progress.rate() == 10.0
    progress.restart(9_020)
    now = 103.0
    progress.advance(10)
    assert (progress.done, progress.rate()) == (9_030, 10.0)


def test_progress_has_a_rate_and_a_remaining_time(loaded: Loaded) -> None:
    job = loaded.fit("slow-progress", SLOW)

    def moving() -> dict | None:
        progress = loaded.service.get(f"/v1/jobs/{job['id']}")["progress"]
        return progress if progress["rate"] and progress["eta_seconds"] is not None else None

    progress = wait_for(moving, 60, "progress with a rate")
    assert 0 < progress["done"] <= progress["total"] == 1800
    assert progress["unit"] == "examples"
    loaded.service.post(f"/v1/jobs/{job['id']}/cancel", {}, 202)
    loaded.service.finished(job)


def test_a_cancelled_job_stops_soon_leaves_nothing_and_can_be_retried(loaded: Loaded) -> None:
    service = loaded.service
    job = loaded.fit("cancelled", SLOW)
    wait_for(lambda: service.get(f"/v1/jobs/{job['id']}")["progress"]["done"] > 0, 60, "a first shard")
    began = time.monotonic()
    assert service.post(f"/v1/jobs/{job['id']}/cancel", {}, 202)["state"] == "cancelling"
    assert service.finished(job)["state"] == "cancelled"
    assert time.monotonic() - began < 5
    index = service.get("/v1/indexes/cancelled")
    assert index["status"] == "failed"
    assert not (service.data / "artifacts" / "indexes" / index["id"]).exists()
    assert (
        service.http.post(
            "/v1/indexes/cancelled/attributions", json={"queries": [{"dataset": "test", "rows": [0]}]}
        ).status_code
        == 409
    )
    assert service.http.post(f"/v1/jobs/{job['id']}/cancel").status_code == 409
    assert service.post(f"/v1/jobs/{job['id']}/retry", {}, 202)["state"] == "queued"
    assert service.finished(job)["state"] == "succeeded"
    assert service.get("/v1/indexes/cancelled")["status"] == "ready"
    assert service.http.post(f"/v1/jobs/{job['id']}/retry").status_code == 409


def test_an_index_that_is_not_ready_is_told(loaded: Loaded) -> None:
    job = loaded.fit("early", SLOW)
    answer = loaded.service.http.post(
        "/v1/indexes/early/attributions", json={"queries": [{"dataset": "test", "rows": [0]}]}
    )
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/not-ready")
    assert loaded.service.http.delete("/v1/indexes/early").status_code == 409
    loaded.service.post(f"/v1/jobs/{job['id']}/cancel", {}, 202)
    loaded.service.finished(job)


def test_a_queued_job_is_cancelled_at_once(loaded: Loaded) -> None:
    first, second = loaded.fit("first-in-line", SLOW), loaded.fit("second-in-line", SLOW)
    assert loaded.service.post(f"/v1/jobs/{second['id']}/cancel", {}, 202)["state"] == "cancelled"
    assert loaded.service.get("/v1/indexes/second-in-line")["status"] == "failed"
    assert loaded.service.http.delete("/v1/indexes/second-in-line").status_code == 204
    loaded.service.post(f"/v1/jobs/{first['id']}/cancel", {}, 202)
    assert loaded.service.finished(first)["state"] == "cancelled"


def test_jobs_are_listed_by_state_and_kind(loaded: Loaded) -> None:
    items = loaded.service.get("/v1/jobs?state=succeeded&kind=import&limit=200")["items"]
    assert {"import"} == {item["kind"] for item in items}
    assert {"succeeded"} == {item["state"] for item in items}


@pytest.mark.parametrize("after", ["after-write", "after-fsync", "after-manifest", "after-rename"])
def test_publishing_survives_a_power_cut_at_every_point(tmp_path: Path, after: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from app.storage.artifacts import ArtifactStore\n"
        "store = ArtifactStore(Path(sys.argv[1])); store.prepare(); work = store.workspace('job') / 'out'; work.mkdir(exist_ok=True)\n"
        "(work / 'data').write_bytes(b'x' * 1000); print(store.publish(work, 'indexes/one').sha256)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    cut = subprocess.run(
        command, env={"HEADWATER_CRASH_AT": after, "PATH": ""}, cwd=Path(__file__).parents[2], check=False
    )
    assert cut.returncode == 137
    store = ArtifactStore(tmp_path)
    visible = (tmp_path / "artifacts" / "indexes" / "one").exists()
    assert visible == (after == "after-rename")
    if visible:
        store.verify("indexes/one")
    again = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    assert store.verify("indexes/one").exists()
    assert again.stdout.strip()


def test_two_workers_that_publish_one_artifact_at_once_both_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rename = ArtifactStore(tmp_path), Path.rename

    def made(worker: str, content: bytes) -> Path:
        (store.workspace(worker) / "data").write_bytes(content)
        return store.workspace(worker)

    def overtaken(folder: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        store.publish(made("faster", b"1"), "indexes/one")
        return rename(folder, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    published = store.publish(made("slower", b"1"), "indexes/one")
    assert (store.verify(published.name) / "data").read_bytes() == b"1"
    assert not store.workspaces()
    with pytest.raises(CorruptArtifactError, match="other content"):
        store.publish(made("other", b"2"), "indexes/one")


async def test_a_worker_whose_supervisor_ended_while_it_started_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_SUPERVISED", "0")
    await asyncio.wait_for(_parent_gone(), 30)
    for alive in (str(os.getppid()), None):
        monkeypatch.setenv("HEADWATER_SUPERVISED", alive) if alive else monkeypatch.delenv("HEADWATER_SUPERVISED")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_parent_gone(), 0.1)


def test_a_worker_does_not_wait_for_a_computation_that_does_not_stop() -> None:
    code = """
import asyncio, threading
from app.worker import main

async def work(settings):
    asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)

main.work = work
main.main()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    "stands_still", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"], ids=["loop", "interpreter"]
)
def test_a_worker_that_hangs_ends_and_says_where(stands_still: str) -> None:
    """Not even a call that never gives the interpreter back keeps it."""
    code = f"""
import asyncio, ctypes, time
from app.worker.main import ended_if_hung

async def work():
    watched = asyncio.create_task(ended_if_hung(2))
    await asyncio.sleep(3)
    print("turned", flush=True)
    {stands_still}

asyncio.run(work())
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=50, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "turned\n")
    assert "Timeout" in ended.stderr and "in work" in ended.stderr


async def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[int | OSError] = [1, BlockingIOError(11, "Resource temporarily unavailable")]
    again = asyncio.Event()

    async def worker() -> int:
        if not outcomes:
            again.set()
            await asyncio.Event().wait()
        outcome = outcomes.pop()
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    monkeypatch.setattr(supervisor, "_worker", worker)
    keeping = asyncio.create_task(supervisor._keep_worker())
    await asyncio.wait_for(again.wait(), 30)
    keeping.cancel()
