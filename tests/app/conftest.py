"""What several files of tests share: sessions of the running service's database, and a model that was trained from its recipe."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.db.embedded import get_server
from app.db.session import SessionMaker, create_engine, create_sessionmaker
from app.settings import DatabaseSettings
from tests.conftest import MLP, Loaded

RECIPE: dict[str, Any] = {
    "optimizer": {"type": "sgd", "momentum": 0.9},
    "learning_rate": 0.05,
    "weight_decay": 1e-3,
    "epochs": 4,
    "batch_size": 50,
}
PROTOCOL = {"alpha": 0.5, "subsets": 32, "seeds": 1}


@pytest.fixture
async def sessions(loaded: Loaded) -> AsyncIterator[SessionMaker]:
    server = get_server(loaded.service.data.resolve() / "postgres", cleanup_mode=None)
    database = create_engine(DatabaseSettings(url=server.get_uri()))
    yield create_sessionmaker(database)
    await database.dispose()


@pytest.fixture(scope="session")
def trained(loaded: Loaded) -> Loaded:
    """The shared service with a model that was trained from its recipe, and an index of it."""
    service = loaded.service
    body = {"name": "retrained", "architecture": MLP, "task": {"type": "classification"}, "recipe": RECIPE}
    assert service.post("/v1/models", body, 201)["recipe"]["epochs"] == 4
    job = service.post("/v1/models/retrained/trainings", {"dataset": "digits", "seeds": [0, 1]}, 202)
    assert service.finished(job)["state"] == "succeeded"
    fit = {"name": "retrained-ekfac", "model": "retrained", "dataset": "digits", "method": {"type": "ekfac"}}
    assert service.finished(service.post("/v1/indexes", fit, 202))["state"] == "succeeded"
    return loaded


@pytest.fixture(scope="session")
def evaluated(trained: Loaded) -> dict[str, Any]:
    """The finished evaluation of the index."""
    body = {
        "queries": {"dataset": "test", "count": 30},
        "protocol": PROTOCOL,
        "deterministic": [0.9],
        "loo": {"examples": 4, "seeds": 2},
        "removal": {"top": [10], "queries": 2, "seeds": 1},
        "mislabelled": {"field": "row", "op": "lt", "value": 20},
        "source": "source",
        "tune": {"dampings": [0.01, 0.1, 1.0]},
    }
    job = trained.service.post("/v1/indexes/retrained-ekfac/evaluations", body, 202)
    assert trained.service.finished(job)["state"] == "succeeded"
    found: dict[str, Any] = trained.service.get("/v1/indexes/retrained-ekfac/evaluations")["items"][0]
    return found
