"""The engine's client and its batches."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from app.db.embedded import get_server
from app.db.session import create_engine, create_sessionmaker
from app.engine.cache import IndexCache
from app.engine.checks import check_values
from app.engine.client import EngineClient, _result
from app.engine.frames import BEAT, LENGTH, decoded
from app.engine.operations import Operations
from app.engine.process import Answers, _answers, _awaited, _framed
from app.errors import EngineBusy, EngineUnavailable, InvalidRequest
from app.indexes import service as indexes
from app.settings import DatabaseSettings, EngineSettings, Settings
from app.storage.artifacts import ArtifactStore
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.fit_spec import FitSpec
from attribution_core.spec import ArchitectureSpec, CausalLanguageModelingTask
from tests.conftest import Loaded
from tests.core.methods.problems import classification
from tests.service import ROOT

# Starts what a module starts, on a machine that projects as others do or otherwise.
STARTED = """
import importlib, sys
from attribution_core.projection import check
module, alike = importlib.import_module(sys.argv[1]), sys.argv[2] == "alike"
if not alike:
    check.GOLDEN["sjlt"] = "of another machine"

async def work(settings):
    pass

module.work = work  # the worker's own looks for a database
module.main()
"""


@pytest.mark.parametrize("order", ["desc", "asc"])
def test_pages_of_self_influence_go_on_after_a_row_that_was_deleted_since(order: str) -> None:
    scores = np.array([0.5, 2.0, 2.0, -1.0, 0.5, 3.0, 0.0])
    index = MagicMock(num_examples=len(scores), self_influence=lambda: scores)
    operations = Operations(MagicMock(get=lambda *_: index), 1)
    found: list[int] = []
    after, deleted, more = None, [0], True
    while more:
        payload = {"artifact": "", "fit": {}, "order": order, "limit": 2, "after": after, "deleted": deleted}
        page = operations.self_influence(payload)
        assert page["scores"] == scores[page["rows"]].tolist()
        found, after, more = found + page["rows"], page["rows"][-1], page["more"]
        deleted = [*deleted, page["rows"][0], after]
    assert found == ([5, 1, 2, 4, 6, 3] if order == "desc" else [3, 6, 4, 1, 2, 5])


async def test_a_full_queue_refuses_and_a_slow_engine_times_out() -> None:
    client = EngineClient(EngineSettings(queue_limit=1, timeout_seconds=0.3))  # never started
    first = asyncio.create_task(client.call("ping", {}))
    await asyncio.sleep(0.05)
    with pytest.raises(EngineBusy) as busy:
        await client.call("ping", {})
    assert busy.value.headers["Retry-After"]
    with pytest.raises(EngineUnavailable) as slow:
        await first
    assert slow.value.headers["Retry-After"]
    with pytest.raises(EngineUnavailable):
        await client.call("ping", {})  # the queue has room again


async def test_a_killed_engine_is_restarted() -> None:
    client = EngineClient(EngineSettings(timeout_seconds=30))
    await client.start()
    try:
        assert (await client.call("describe_plugins", {}))["plugins"] == []
        assert client._process is not None
        waiting = [asyncio.create_task(client.call("describe_plugins", {})) for _ in range(3)]
        client._process.kill()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, EngineUnavailable | dict)
        await asyncio.sleep(0.2)
        assert (await client.call("describe_plugins", {}))["plugins"] == []
        with pytest.raises(InvalidRequest):
            await client.call("nothing", {})
    finally:
        await client.stop()
    assert client._process.returncode is not None


async def test_an_engine_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.client._MISSED_BEATS", 4)
    client = EngineClient(EngineSettings(timeout_seconds=60))
    await client.start()
    try:
        await client.call("describe_plugins", {})
        assert client._process is not None
        hung = client._process
        os.kill(hung.pid, signal.SIGSTOP)
        with pytest.raises(EngineUnavailable, match="being restarted"):
            await client.call("describe_plugins", {})
        assert (await client.call("describe_plugins", {}))["plugins"] == []
        assert hung.returncode == -signal.SIGKILL
    finally:
        await client.stop()


def test_an_engine_shows_that_it_lives_until_a_batch_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.process.BEAT_SECONDS", 0.01)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as inputs, os.fdopen(writing, "wb") as outputs:
        answers = Answers(outputs, patience=3600)
        beating = threading.Thread(target=answers.beat)
        beating.start()
        with answers.computing():
            for _ in range(3):
                (length,) = LENGTH.unpack(inputs.read(LENGTH.size))
                assert decoded(inputs.read(length)) == {"number": BEAT}
            answers._patience = 0
            beating.join(60)
            assert not beating.is_alive()
        assert not answers.hangs()


async def test_requests_that_nobody_waits_for_are_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    client, sent = EngineClient(EngineSettings(timeout_seconds=0.2)), []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        assert _awaited([message]) == [message]

    monkeypatch.setattr(client, "_send", send)
    client._ready.set()
    with pytest.raises(EngineUnavailable, match="did not answer"):
        await client.call("describe_plugins", {})
    assert _awaited(sent) == []


async def test_an_engine_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    client, tries, again = EngineClient(EngineSettings()), 0, asyncio.Event()

    async def run() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        again.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(client, "_run_once", run)
    await client.start()
    await asyncio.wait_for(again.wait(), 30)
    await client.stop()


def test_one_request_that_fails_ends_neither_its_batch_nor_the_engine() -> None:
    class Broken:
        def attribute(self, payloads: list[dict[str, Any]]) -> list[dict[str, Any]]:
            raise FileNotFoundError(2, "No such file", "rows.npy")

        def run(self, operation: str, payload: dict[str, Any]) -> dict[str, Any]:
            return {"results": []} if payload["good"] else self.attribute([payload])[0]

    batch = [{"number": n, "operation": "attribute", "payload": {"good": n == 0}} for n in range(2)]
    good, bad = _answers(cast(Operations, Broken()), batch)
    assert good["result"] == {"results": []}
    assert bad["error"]["kind"] == "corrupt"


async def test_requests_answered_together_are_answered_alike(steady: Loaded) -> None:
    data = steady.service.data.resolve()
    server = get_server(data / "postgres", cleanup_mode=None)
    database, artifacts = create_engine(DatabaseSettings(url=server.get_uri())), ArtifactStore(data)
    async with create_sessionmaker(database)() as session:
        index = await indexes.find_ready(session, "steady")
        fit = await indexes.fit_spec(session, "steady", Settings(data_dir=data), artifacts)
    await database.dispose()
    operations = Operations(IndexCache(artifacts, 1 << 30, "cpu"), 1000)
    common = {
        "artifact": index.artifact,
        "fit": fit.model_dump(mode="json", by_alias=True),
        "damping": None,
        "rescore": True,
        "deleted": [],
    }
    location = {"folder": str(fit.dataset.folder), "spec": fit.dataset.spec.model_dump_json()}
    payloads = [
        {**common, "queries": [{**location, "rows": rows}], "top_k": 5, "filter": None} for rows in ([1], [2, 3], [4])
    ]
    together = operations.attribute(payloads)
    for payload, answer in zip(payloads, together, strict=True):
        alone = operations.run("attribute", payload)
        assert len(answer["results"]) == len(payload["queries"][0]["rows"])
        for one, other in zip(answer["results"], alone["results"], strict=True):
            for sign in ("positive", "negative"):
                assert [entry["row"] for entry in one[sign]] == [entry["row"] for entry in other[sign]]
                scores, expected = ([entry["score"] for entry in found[sign]] for found in (one, other))
                assert scores == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_an_answer_that_cannot_be_sent_is_refused_and_the_engine_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = _framed({"number": 7, "result": {"scores": [1.0]}})
    assert _result(decoded(sent[LENGTH.size :])) == {"scores": [1.0]}
    monkeypatch.setattr("app.engine.frames.MAX_FRAME_BYTES", 1000)
    for result, reason in (({"scores": [float("nan")]}, "not JSON compliant"), ({"scores": [0.5] * 999}, "too large")):
        answer = decoded(_framed({"number": 7, "result": result})[LENGTH.size :])
        assert answer["number"] == 7
        with pytest.raises(InvalidRequest, match=reason):
            _result(answer)


def test_an_index_that_grows_with_its_answers_makes_room(tmp_path: Path) -> None:
    """Gauss-Newton solves keep pseudo-gradients from the first query on; the bound on memory counts them."""
    problem, artifacts = classification(tmp_path / "problem"), ArtifactStore(tmp_path)
    artifacts.prepare()
    fits, limit = [], 0
    for name in ("one", "two"):
        index = problem.fit(name, method={"type": "gauss_newton", "seed": len(fits)})
        limit += index.bytes
        artifacts.publish(index.folder, name)
        fits.append((name, index.spec.model_dump(mode="json", by_alias=True)))
    cache = IndexCache(artifacts, limit, "cpu")
    first, second = (cache.get(*fit) for fit in fits)
    assert cache.get(*fits[0]) is first
    before = first.bytes
    first.query(problem.queries(), None)
    assert first.bytes > before
    assert cache.get(*fits[0]) is first
    assert cache.get(*fits[1]) is not second


@pytest.mark.parametrize("module", ["app.engine.process", "app.worker.main"])
@pytest.mark.parametrize("machine", ["alike", "other"])
def test_neither_engine_nor_worker_runs_where_projections_come_out_differently(
    module: str, machine: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED, module, machine],
        cwd=ROOT,
        env={**os.environ, "HEADWATER_DATA_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) is (machine == "alike"), done.stderr
    assert ("ProjectionMismatchError: projections of type sjlt" in done.stderr) is (machine == "other")


@pytest.mark.parametrize(
    ("query", "tokens", "pointer"),
    [
        ({"example": {}}, [[3, 10]], "/queries/4/example/input"),
        ({"rows": [7, 9]}, [[3, 9], [12, 0]], "/queries/4/rows/1"),
        ({"rows": [7]}, [[3, 9]], None),
        ({"rows": [7]}, [[3, 50_000]], None),  # padded
    ],
)
def test_a_token_beyond_the_vocabulary_is_named(
    query: dict[str, Any], tokens: list[list[int]], pointer: str | None
) -> None:
    architecture = ArchitectureSpec(name="transformer_lm", arguments={"vocab_size": 10})
    spec = cast(FitSpec, MagicMock(architecture=architecture, task=CausalLanguageModelingTask()))
    inputs = torch.tensor(tokens)
    batch = Batch(rows=torch.zeros(len(tokens)), inputs=inputs, targets=None, mask=inputs < 50_000)
    if pointer is None:
        check_values(spec, batch, 4, query)
    else:
        with pytest.raises(InvalidInputError, match="beyond the model's vocabulary of 10") as caught:
            check_values(spec, batch, 4, query)
        assert caught.value.pointer == pointer
