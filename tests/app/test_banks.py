"""Banks of retrainings over HTTP: made once, shared, listed and deleted."""

from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from sqlalchemy import func, select

from app.db.embedded import get_server
from app.db.session import create_engine, create_sessionmaker
from app.errors import InvalidRequest
from app.indexes import creation
from app.indexes.schemas import IndexCreate
from app.replay import service as replays
from app.replay.schemas import EvaluationCreate
from app.settings import DatabaseSettings, Settings
from app.storage.artifacts import ArtifactStore
from tests.app.conftest import PROTOCOL
from tests.conftest import Loaded


def test_a_second_index_shares_the_bank(trained: Loaded, evaluated: dict[str, Any]) -> None:
    before = trained.service.get("/v1/banks")["items"]
    fit = {"name": "retrained-dot", "model": "retrained", "dataset": "digits", "method": {"type": "grad_dot"}}
    assert trained.service.finished(trained.service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    body = {"queries": {"dataset": "test", "count": 30}, "protocol": PROTOCOL}
    job = trained.service.post("/v1/indexes/retrained-dot/evaluations", body, 202)
    ended = trained.service.finished(job)
    assert ended["state"] == "succeeded"
    assert ended["progress"]["total"] == 0, "nothing was trained again"
    after = trained.service.get("/v1/banks")["items"]
    assert [(bank["id"], bank["retrainings"]) for bank in after] == [(b["id"], b["retrainings"]) for b in before]


@pytest.mark.parametrize("kind", ["evaluation", "index"])
async def test_nothing_is_written_before_the_engine_has_answered(trained: Loaded, kind: str) -> None:
    """An equal request would wait for the row, and the database would refuse to let it wait for long."""
    data = trained.service.data.resolve()
    database = create_engine(DatabaseSettings(url=get_server(data / "postgres", cleanup_mode=None).get_uri()))
    protocol = {"subsets": 400, "seeds": 7}
    asked = EvaluationCreate.model_validate({"queries": {"dataset": "test", "count": 4}, "protocol": protocol})
    fit = {
        "name": "never",
        "model": "retrained",
        "dataset": "digits",
        "method": {"type": "datamodels", "bank": protocol},
    }
    async with create_sessionmaker(database)() as session:

        async def answered(*_: object) -> dict[str, float]:
            written = await session.execute(select(func.pg_current_xact_id_if_assigned()))
            assert written.scalar() is None
            return {"seconds_per_step": 1e9}

        resources = MagicMock(settings=Settings(data_dir=data), artifacts=ArtifactStore(data))
        resources.engine.call = AsyncMock(side_effect=answered)
        with pytest.raises(InvalidRequest, match="hours"):
            if kind == "evaluation":
                await replays.create_evaluation(session, resources, "retrained-ekfac", asked)
            else:
                await creation.create(session, IndexCreate.model_validate(fit), resources)
    await database.dispose()


def test_banks_are_listed_and_deleted(trained: Loaded, evaluated: dict[str, Any]) -> None:
    listed = trained.service.get("/v1/banks")["items"]
    deterministic = next(bank for bank in listed if bank["protocol"]["semantics"] == "mask")
    assert deterministic["bytes"] > 0
    assert trained.service.get(f"/v1/banks/{deterministic['id']}") == deterministic
    assert trained.service.http.delete(f"/v1/banks/{deterministic['id']}").status_code == 204
    assert trained.service.http.get(f"/v1/banks/{deterministic['id']}").status_code == 404
