"""What is removed as nothing needs it any more, and what must stay, in the running service's database and files."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.ids import new_id
from app.db.session import SessionMaker
from app.db.tables import Dataset, Idempotency, Job
from app.errors import Conflict
from app.jobs import repository
from app.jobs.service import RESOURCES, Resource
from app.storage.artifacts import ArtifactStore
from app.worker.sweeping import sweep_files
from tests.app.job_rows import finish, new_job
from tests.conftest import Loaded


async def test_files_that_nothing_needs_are_swept(sessions: SessionMaker, loaded: Loaded) -> None:
    """As a killed worker leaves them: weights without a row, workspaces of jobs that are over or whose thing is gone."""
    store = ArtifactStore(loaded.service.data)
    (store.workspace("orphan-weights") / "weights.safetensors").write_bytes(b"1")
    orphan = store.publish(store.workspace("orphan-weights"), "checkpoints/ckpt_orphan").name
    alive, gone = await new_job(sessions), await new_job(sessions)  # the index that both make does not exist
    for job in (alive, gone):
        (store.workspace(job) / "part").write_bytes(b"1")
    await finish(sessions, gone)
    await sweep_files(sessions, store, 72)
    assert store.open(orphan).exists(), "it may be about to be committed"
    assert (alive in store.workspaces(), gone in store.workspaces()) == (True, False)
    await sweep_files(sessions, store, 72, orphan_seconds=-1)
    assert not (loaded.service.data / "artifacts" / orphan).exists()
    for checkpoint in loaded.checkpoints:
        store.verify(f"checkpoints/{checkpoint}")
    await finish(sessions, alive)


async def test_every_kind_of_leftover_is_swept(sessions: SessionMaker, loaded: Loaded) -> None:
    """What was published or uploaded by killed processes, and what a deletion was about to remove; never what a row names."""
    store, root = ArtifactStore(loaded.service.data), loaded.service.data
    names = ("datasets/ds_gone", "indexes/idx_gone", "indexes/idx_gone.2", "banks/mdl_gone/bank_gone/000001")
    for name in names:
        (store.workspace("leftover") / "part").write_bytes(b"1")
        store.publish(store.workspace("leftover"), name)
    left = [root / "uploads" / "killed.upload", root / "uploads" / "gone.data", root / "work" / "ckpt_gone" / "part"]
    left[-1].parent.mkdir()
    for path in left:
        path.write_bytes(b"1")
    dataset = loaded.service.get("/v1/datasets/digits")["id"]
    failed = Dataset(id=new_id("ds"), name=new_id("name"), status="failed", spec={}, upload="wanted.data")
    (root / "uploads" / "wanted.data").write_bytes(b"1")
    async with sessions.begin() as session:
        session.add(failed)
        old = Idempotency(
            owner="someone", key="old", request_hash="", claim="", expires_at=datetime(2020, 1, 1, tzinfo=UTC)
        )
        session.add(old)
    await sweep_files(sessions, store, 72)
    assert all(path.exists() for path in left), "they may be about to be named"
    await sweep_files(sessions, store, 72, orphan_seconds=-1)
    assert not any(path.exists() for path in left)
    assert not any((root / "artifacts" / name).exists() for name in names)
    assert (root / "uploads" / "wanted.data").exists(), "a retry imports it"
    store.verify(f"datasets/{dataset}")
    async with sessions.begin() as session:
        assert await session.get(Idempotency, ("someone", "old")) is None
        await session.delete(await session.get(Dataset, failed.id))


async def test_shards_of_a_job_that_failed_are_kept_for_a_while(
    sessions: SessionMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def accepted(session: AsyncSession, job: Job) -> None: ...

    monkeypatch.setitem(RESOURCES, "fit", Resource(accepted, RESOURCES["fit"].fail))
    store, job = ArtifactStore(tmp_path), await new_job(sessions, shards=2)
    store.claim(job)
    (store.workspace(job) / "shard").write_bytes(b"1")
    await finish(sessions, job)
    await sweep_files(sessions, store, kept_hours=72)
    assert job in store.workspaces()
    await sweep_files(sessions, store, kept_hours=0)
    assert job not in store.workspaces()
    async with sessions() as session:
        assert not await repository.has_shards(session, job), "a retry plans them again"


async def test_progress_of_jobs_that_ended_long_ago_is_forgotten(sessions: SessionMaker) -> None:
    kept = {}
    for age in (1, 30):
        job = await new_job(sessions)
        await finish(sessions, job)
        async with sessions.begin() as session:
            for kind in ("progress", "state"):
                await repository.add_event(session, job, kind, {})
            ended = func.clock_timestamp() - timedelta(hours=age)
            await session.execute(update(Job).where(Job.id == job).values(finished_at=ended))
            await repository.forget_progress(session, 24)
            kept[age] = [event.type for event in await repository.events_after(session, job, 0)]
    assert kept == {1: ["progress", "state"], 30: ["state"]}


async def test_nothing_is_swept_for_another_database(sessions: SessionMaker, tmp_path: Path) -> None:
    """A service that was pointed at an empty database must not take every file for a leftover."""
    store = ArtifactStore(tmp_path)
    (store.workspace("some") / "part").write_bytes(b"1")
    store.publish(store.workspace("some"), "datasets/ds_of_the_other")
    store.claim("job_of_the_other")
    await sweep_files(sessions, store, 72, orphan_seconds=-1)
    store.verify("datasets/ds_of_the_other")
    assert store.owner() == "job_of_the_other"


async def test_what_is_wrong_with_one_job_leaves_the_others_to_be_swept(
    sessions: SessionMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workspace stays, as nobody can tell whether it is needed."""
    store, jobs = ArtifactStore(tmp_path), [await new_job(sessions) for _ in range(3)]
    store.claim(jobs[0])
    for job in jobs:
        (store.workspace(job) / "shard").write_bytes(b"1")
        await finish(sessions, job)

    async def puzzled(session: AsyncSession, job: Job) -> None:
        if job.id == jobs[1]:
            raise RuntimeError("a fault of ours")
        raise Conflict("not again")

    monkeypatch.setitem(RESOURCES, "fit", Resource(puzzled, RESOURCES["fit"].fail))
    await sweep_files(sessions, store, kept_hours=72)
    assert [job in store.workspaces() for job in jobs] == [False, True, False]
