"""Claims, leases and fences of jobs and shards, straight on the rows, in the running service's database."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
from fastapi import Response
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import DataError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.embedded import get_server
from app.db.ids import new_id
from app.db.references import by_reference
from app.db.session import SessionMaker, create_engine, create_sessionmaker
from app.db.tables import Dataset, Idempotency, Job, Model, Shard
from app.errors import Conflict
from app.jobs import repository
from app.jobs.service import RESOURCES, Resource
from app.models import service as models
from app.replay import plans
from app.settings import DatabaseSettings, Settings
from app.storage.artifacts import ArtifactStore
from app.web.idempotency import IdempotencyClaim
from app.worker.runner import Effect, Kind, Runner, Running, own_folder, wake_abandoned
from app.worker.sweeping import sweep_files
from attribution_core.errors import Cancelled
from attribution_core.training.recipe import CheckpointInitialisation, Recipe, Sgd
from tests.conftest import Loaded


@pytest.fixture
async def sessions(loaded: Loaded) -> AsyncIterator[SessionMaker]:
    server = get_server(loaded.service.data.resolve() / "postgres", cleanup_mode=None)
    database = create_engine(DatabaseSettings(url=server.get_uri()))
    yield create_sessionmaker(database)
    await database.dispose()


async def new_job(sessions: SessionMaker, shards: int = 0) -> str:
    """A running job that a worker with an hour of lease holds, so that the service's own worker leaves it alone."""
    job = Job(
        id=new_id("job"),
        kind="fit",
        state="running",
        resource_type="index",
        resource_id="none",
        progress_unit="examples",
        attempt=1,
    )
    async with sessions.begin() as session:
        job.lease_expires_at = await session.scalar(select(repository.lease(3600)))
        session.add(job)
        await session.flush()
        rows = [
            Shard(job_id=job.id, stage=0, ordinal=n, state="queued", units=10 if n >= 0 else 0)
            for n in (*range(shards), -1)
        ]
        await repository.add_shards(session, rows)
    return job.id


async def expire(sessions: SessionMaker, job_id: str) -> None:
    async with sessions.begin() as session:
        await session.execute(update(Shard).where(Shard.job_id == job_id).values(lease_expires_at=repository.lease(-1)))


async def finish(sessions: SessionMaker, job_id: str) -> None:
    async with sessions.begin() as session:
        await repository.finish_job(session, job_id, None, "cancelled", None)


async def test_a_late_worker_changes_nothing(sessions: SessionMaker) -> None:
    job = await new_job(sessions, shards=1)
    async with sessions.begin() as session:
        first = await repository.claim_shard(session, job, 0, "slow", 60)
    async with sessions.begin() as session:
        assert await repository.claim_shard(session, job, 0, "quick", 60) is None, "a live lease is respected"
    await expire(sessions, job)
    async with sessions.begin() as session:
        second = await repository.claim_shard(session, job, 0, "quick", 60)
    assert first is not None
    assert second is not None
    assert (first.ordinal, second.ordinal) == (0, 0)
    assert second.attempt == first.attempt + 1
    async with sessions.begin() as session:
        assert not await repository.renew_shard(session, first, 60)
        assert not await repository.finish_shard(session, first, "stale")
        assert await repository.finish_shard(session, second, "fresh")
        assert not await repository.finish_shard(session, second, "twice")
    await finish(sessions, job)


async def test_the_reduction_waits_for_every_shard(sessions: SessionMaker) -> None:
    job = await new_job(sessions, shards=2)
    async with sessions.begin() as session:
        held = [await repository.claim_shard(session, job, 0, "w", 60) for _ in range(3)]
        assert [shard and shard.ordinal for shard in held] == [0, 1, None]
        await repository.finish_shard(session, held[0], "a")
        assert await repository.claim_shard(session, job, 0, "w", 60) is None
        await repository.finish_shard(session, held[1], "b")
        reduction = await repository.claim_shard(session, job, 0, "w", 60)
        assert reduction is not None
        assert reduction.ordinal == -1
        assert await repository.open_stage(session, job) == 0
        await repository.finish_shard(session, reduction, "c")
        assert await repository.open_stage(session, job) is None
        assert await repository.units(session, job) == (20, 20)
    await finish(sessions, job)


async def test_a_shard_finished_during_its_renewal_is_not_lost(
    sessions: SessionMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await new_job(sessions, shards=1)
    runner = Runner(Settings(), sessions, ArtifactStore(tmp_path), "w", {})
    async with sessions.begin() as session:
        held = await session.get(Job, job)
        assert held is not None
        held.worker = "w"
        shard = await repository.claim_shard(session, job, 0, "w", 60)
    running = Running(held, shard=shard)
    renew = repository.renew_shard

    async def finished_meanwhile(session: AsyncSession, shard: Shard, seconds: float) -> bool:
        assert await repository.finish_shard(session, shard, "a")
        running.shard = None
        return await renew(session, shard, seconds)

    monkeypatch.setattr(repository, "renew_shard", finished_meanwhile)
    async with sessions.begin() as session:
        assert await runner._renewed(session, running) == "running"
    monkeypatch.setattr(repository, "renew_shard", renew)
    running.shard = shard  # as of a worker that still computes what another one has finished
    async with sessions.begin() as session:
        assert await runner._renewed(session, running) == "lost"
    await finish(sessions, job)


async def test_a_waiting_job_is_announced_once(sessions: SessionMaker) -> None:
    async with sessions() as session:  # never committed, so that the service's own worker sees nothing of it
        job = Job(id=new_id("job"), kind="fit", state="queued", resource_type="index", resource_id="none")
        job.progress_unit, job.updated_at = "examples", datetime(2020, 1, 1, tzinfo=UTC)
        session.add(job)
        await session.flush()
        for _ in range(3):
            await wake_abandoned(session)
        count = text("SELECT count(*) FROM procrastinate_jobs WHERE args->>'job_id' = :job")
        assert await session.scalar(count, {"job": job.id}) == 1
        await session.rollback()


async def test_messages_of_lost_workers_are_forgotten(sessions: SessionMaker, tmp_path: Path) -> None:
    job = await new_job(sessions)
    insert = (
        "INSERT INTO procrastinate_jobs (queue_name, task_name, args, status) VALUES ('none', 'none', :args, 'doing')"
    )
    found = text("SELECT count(*) FROM procrastinate_jobs WHERE queue_name = 'none'")
    async with sessions.begin() as session:
        await session.execute(text(insert), {"args": f'{{"job_id": "{job}"}}'})
    await Runner(Settings(), sessions, ArtifactStore(tmp_path), "w", {}).sweep()
    async with sessions() as session:
        assert await session.scalar(found) == 0
    await finish(sessions, job)


@pytest.mark.parametrize(("kind", "slug"), [(IntegrityError, "conflict"), (DataError, "internal")])
async def test_a_result_that_the_database_refuses_ends_the_job(
    sessions: SessionMaker, tmp_path: Path, kind: type[IntegrityError | DataError], slug: str
) -> None:
    """Trying again would be refused again, for ever."""
    job_id = await new_job(sessions)
    async with sessions.begin() as session:
        job = await session.get(Job, job_id)
        assert job is not None
        job.kind = "training"

    async def work(runner: Runner, running: Running) -> Effect:
        async def effect(session: AsyncSession) -> None:
            raise kind("INSERT", {}, Exception("refused"))

        return effect

    await Runner(Settings(), sessions, ArtifactStore(tmp_path), "w", {"training": Kind(work)})._lead(Running(job))
    async with sessions() as session:
        ended = await repository.get(session, job_id)
    assert ended is not None
    assert (ended.state, (ended.error or {})["type"]) == ("failed", f"/problems/{slug}")


async def test_a_job_whose_file_cannot_be_read_ends(sessions: SessionMaker, tmp_path: Path) -> None:
    """Only a lost database is waited for: a file that is gone stays gone."""
    job_id = await new_job(sessions)
    async with sessions() as session:
        job = await repository.get(session, job_id)
    assert job is not None
    job.kind = "training"

    async def work(runner: Runner, running: Running) -> Effect:
        raise FileNotFoundError(2, "No such file", "upload")

    await Runner(Settings(), sessions, ArtifactStore(tmp_path), "w", {"training": Kind(work)})._lead(Running(job))
    async with sessions() as session:
        assert await repository.state_of(session, job_id) == "failed"


async def test_what_a_request_names_stays_until_its_transaction_ends(sessions: SessionMaker, loaded: Loaded) -> None:
    """Rows that no column refers to: nothing but the lock keeps them until the job or the recipe that needs them is there."""
    start = CheckpointInitialisation(checkpoint=loaded.checkpoints[0])
    recipe = Recipe(optimizer=Sgd(type="sgd"), learning_rate=0.1, epochs=1, batch_size=10, initialisation=start)
    async with sessions() as naming, sessions() as deleting:
        model = await models.find(naming, "mlp")
        await models._check_initialisation(naming, recipe, model.parameters)
        await plans.keep_asked_datasets(naming, {"queries": [{"dataset": "test", "rows": [0]}]})
        for table, name in ((Model, "mlp"), (Dataset, "test")):
            await deleting.execute(text("SET LOCAL lock_timeout = '50ms'"))
            with pytest.raises(OperationalError):
                await deleting.execute(by_reference(table, name, lock=True))
            await deleting.rollback()


async def test_a_stored_answer_outlives_a_commit_that_seemed_to_fail(sessions: SessionMaker) -> None:
    claim = IdempotencyClaim(sessions, "someone", new_id("key"), "hash")
    assert await claim.take() is None
    async with sessions.begin() as session:
        await claim.keep(session, Response("made", 201))
    await claim.drop()  # as after a commit whose answer was lost
    again = await claim.take()
    assert again is not None
    assert (again.status_code, again.body) == (201, b"made")


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
    sessions: SessionMaker, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def accepted(session: AsyncSession, job: Job) -> None: ...

    monkeypatch.setitem(RESOURCES, "fit", Resource(accepted, RESOURCES["fit"].fail))
    store, job = ArtifactStore(loaded.service.data), await new_job(sessions, shards=2)
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


async def test_a_job_that_ends_its_worker_each_time_is_given_up(sessions: SessionMaker, tmp_path: Path) -> None:
    job_id, settings = await new_job(sessions, shards=1), Settings()

    async def lost() -> Job:
        async with sessions.begin() as session:
            await session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=repository.lease(-1)))
            claimed = await repository.claim_job(session, job_id, "w", 3600)
        assert claimed is not None
        return claimed

    async def work(runner: Runner, running: Running) -> None:
        raise Cancelled("begun")

    runner = Runner(settings, sessions, ArtifactStore(tmp_path), "w", {"fit": Kind(work)})
    for count in range(1, settings.worker.max_attempts):
        assert (await lost()).losses == count
    async with sessions.begin() as session:
        shard = await repository.claim_shard(session, job_id, 0, "w", 60)
        assert shard is not None
        assert await repository.finish_shard(session, shard, "a")
    for _ in range(settings.worker.max_attempts - 1):
        await lost()
    async with sessions.begin() as session:
        held = await repository.get(session, job_id)
        assert held is not None
        await repository.release_job(session, job_id, held.attempt)
        released = await repository.claim_job(session, job_id, "w", 3600)
    assert released is not None
    assert released.losses == settings.worker.max_attempts - 1, "a worker that gave it back was not lost"
    await runner._lead(Running(await lost()))
    async with sessions() as session:
        ended = await repository.get(session, job_id)
    assert ended is not None
    assert ended.state == "failed"
    assert f"ended its worker {settings.worker.max_attempts} times" in (ended.error or {})["detail"]


async def test_a_retry_does_not_let_an_earlier_attempt_in(sessions: SessionMaker) -> None:
    job_id = await new_job(sessions, shards=1)
    async with sessions.begin() as session:
        late = await repository.claim_shard(session, job_id, 0, "late", 60)
        assert late is not None
    await finish(sessions, job_id)
    async with sessions.begin() as session:
        await repository.reset_job(session, job_id)
        job = await repository.claim_job(session, job_id, "next", 60)
        shard = await repository.claim_shard(session, job_id, 0, "next", 60)
        assert job is not None
        assert shard is not None
        assert job.attempt > 1, "the attempt that was cancelled holds number 1"
        assert not await repository.finish_shard(session, late, "late")
        assert await repository.finish_shard(session, shard, "next")
    await finish(sessions, job_id)


def test_an_attempt_clears_away_what_earlier_ones_left_and_nothing_of_later_ones(tmp_path: Path) -> None:
    """A worker that was taken for dead goes on where it was, perhaps just before it lays out its result."""
    runner = Runner(Settings(), cast(SessionMaker, None), ArtifactStore(tmp_path), "w", {})
    folders = {number: own_folder(runner, Running(Job(id="job", attempt=number)), "artifact") for number in (1, 3)}
    assert not folders[1].exists()
    folders[2] = own_folder(runner, Running(Job(id="job", attempt=2)), "artifact")
    assert folders[2].exists()
    assert folders[3].exists()
    (folders[3] / "half").write_bytes(b"1")
    assert not list(own_folder(runner, Running(Job(id="job", attempt=3)), "artifact").iterdir())


async def test_a_helper_that_finds_other_work_than_was_planned_goes_away(
    sessions: SessionMaker, tmp_path: Path
) -> None:
    """Whoever leads the job finds it too, and ends it."""
    job_id, asked = await new_job(sessions), 0

    async def assist(runner: Runner, running: Running) -> None:
        nonlocal asked
        asked += 1
        raise Conflict("It is of another generation.")

    kinds = {"fit": Kind(assist, assist)}
    await Runner(Settings(), sessions, ArtifactStore(tmp_path), "helper", kinds).handle(job_id)
    assert asked == 1
    async with sessions() as session:
        assert await repository.state_of(session, job_id) == "running"
    await finish(sessions, job_id)


async def test_two_workers_never_claim_one_shard(sessions: SessionMaker) -> None:
    job = await new_job(sessions, shards=2)
    async with sessions() as one, sessions() as other:
        first = await repository.claim_shard(one, job, 0, "one", 60)
        second = await repository.claim_shard(other, job, 0, "other", 60)  # while the first has not committed
        assert first is not None
        assert second is not None
        assert {first.ordinal, second.ordinal} == {0, 1}
        await one.commit()
        await other.commit()
    await finish(sessions, job)


async def test_only_the_attempt_that_holds_a_job_can_end_it(sessions: SessionMaker) -> None:
    job = await new_job(sessions)
    async with sessions.begin() as session:
        assert await repository.claim_job(session, job, "thief", 60) is None
        await session.execute(update(Job).where(Job.id == job).values(lease_expires_at=repository.lease(-1)))
        assert job in await repository.abandoned(session)
        claimed = await repository.claim_job(session, job, "next", 60)
        assert claimed is not None
        assert claimed.attempt == 2
        assert await repository.renew_job(session, job, 1, 60) is None
        assert not await repository.finish_job(session, job, 1, "succeeded", None)
        assert await repository.finish_job(session, job, 2, "succeeded", None)
        assert not await repository.finish_job(session, job, 2, "failed", None)
