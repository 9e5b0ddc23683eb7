"""Verifications over HTTP: predictions beside real retraining on real digits."""

from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from app.datasets import service as datasets
from app.db.embedded import get_server
from app.db.session import create_engine, create_sessionmaker
from app.errors import Conflict
from app.indexes import service as indexes
from app.jobs import service as jobs
from app.settings import DatabaseSettings, Settings
from app.storage.artifacts import ArtifactStore
from app.worker import verifications
from app.worker.runner import Runner, Running
from tests.conftest import Loaded

UNKNOWN = {"field": "nowhere", "op": "eq", "value": 1}


def test_a_verification_lays_predictions_beside_retraining(trained: Loaded) -> None:
    body = {
        "queries": [{"dataset": "test", "rows": [3, 8]}],
        "subsets": [{"remove": {"top_positive": 60}}, {"keep": {"where": {"field": "row", "op": "lt", "value": 400}}}],
        "seeds": [0, 1],
    }
    answer = trained.service.http.post(
        "/v1/indexes/retrained-ekfac/verifications", json=body, headers={"Prefer": "wait=60"}
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["retrainings"] == 2 * (1 + 2 + 1)
    for result in found["results"]:
        helpful, kept = result["predictions"]
        assert (helpful["removed"], kept["removed"]) == (60, 200)
        assert len(helpful["realised_by_seed"]) == 2
        assert helpful["predicted_change"] < 0
        assert helpful["realised_change"] < 0, "without its helpful examples the margin falls"
        assert helpful["seed_noise"] >= 0
    listed = trained.service.get("/v1/indexes/retrained-ekfac/verifications")["items"]
    assert trained.service.get(f"/v1/indexes/retrained-ekfac/verifications/{found['id']}") == listed[0]


async def test_a_verification_retrains_the_same_sets_in_every_attempt(
    trained: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples that are deleted meanwhile change none, and with another generation of the index it does not go on."""
    body = {"queries": [{"dataset": "test", "rows": [3]}], "subsets": [{"remove": {"top_positive": 60}}]}
    job_id = trained.service.post("/v1/indexes/retrained-ekfac/verifications", body, 202)["id"]
    trained.service.finished({"id": job_id})
    data = trained.service.data.resolve()
    database = create_engine(DatabaseSettings(url=get_server(data / "postgres", cleanup_mode=None).get_uri()))
    sessions, artifacts = create_sessionmaker(database), ArtifactStore(data)
    runner = Runner(Settings(data_dir=data), sessions, artifacts, "w", {})
    monkeypatch.setattr(artifacts, "workspace", lambda job_id: tmp_path)
    async with sessions() as session:
        running = Running(await jobs.find(session, job_id))
        index = await indexes.find_ready(session, "retrained-ekfac")
    first, *_ = await verifications._prepared(runner, running)
    monkeypatch.setattr(datasets, "deleted_rows", AsyncMock(return_value=first._rows[0][0][:5].tolist()))
    again, *_ = await verifications._prepared(runner, running)
    assert list(first._sets) == list(again._sets)
    later = {"tuned": {"damping": 7.0}}
    monkeypatch.setattr(indexes, "find_ready", AsyncMock(return_value=index))
    monkeypatch.setattr(index, "quality", later)
    with pytest.raises(Conflict, match="ask again"):
        await verifications._prepared(runner, running)
    await database.dispose()


@pytest.mark.parametrize("path", ["verifications", "counterfactuals"])
@pytest.mark.parametrize(
    ("subset", "pointer"),
    [
        ({"remove": {"rows": [600]}}, "/subsets/1/remove"),
        ({"remove": {"ids": ["nobody"]}}, "/subsets/1/remove"),
        ({"keep": {"where": UNKNOWN}}, "/subsets/1/keep"),
        ({"keep": {"rows": []}}, "/subsets/1/keep"),
    ],
)
def test_a_subset_that_cannot_be_is_refused_where_it_stands(
    trained: Loaded, path: str, subset: dict[str, Any], pointer: str
) -> None:
    body = {"queries": [{"dataset": "test", "rows": [3]}], "subsets": [{"remove": {"rows": [1]}}, subset]}
    answer = trained.service.http.post(f"/v1/indexes/retrained-ekfac/{path}", json=body)
    assert (answer.status_code, [entry["pointer"] for entry in answer.json()["errors"]]) == (422, [pointer])
