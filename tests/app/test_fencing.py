"""Claims, leases and fences of jobs and shards, straight on the rows, in the running service's database."""

from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
from fastapi import Response
from sqlalchemy import text, update
from sqlalchemy.exc import DataError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.ids import new_id
from app.db.references import by_reference
from app.db.session import SessionMaker
from app.db.tables import Dataset, Job, Model, Shard
from app.errors import Conflict
from app.jobs import repository
from app.models import service as models
from app.replay import plans
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from app.web.idempotency import IdempotencyClaim
from app.worker.runner import Effect, Kind, Runner, Running, own_folder, wake_abandoned
from attribution_core.errors import Cancelled
from attribution_core.training.recipe import CheckpointInitialisation, Recipe, Sgd
from tests.app.job_rows import finish, new_job
from tests.conftest import Loaded


async def expire(sessions: SessionMaker, job_id: str) -> None:
    async with sessions.begin() as session:
        await session.execute(update(Shard).where(Shard.job_id == job_id).values(lease_expires_at=repository.lease(-1)))


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
