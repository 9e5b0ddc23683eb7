"""What tests of rows share: sessions of the running service's database."""

from collections.abc import AsyncIterator

import pytest

from app.db.embedded import get_server
from app.db.session import SessionMaker, create_engine, create_sessionmaker
from app.settings import DatabaseSettings
from tests.conftest import Loaded


@pytest.fixture
async def sessions(loaded: Loaded) -> AsyncIterator[SessionMaker]:
    server = get_server(loaded.service.data.resolve() / "postgres", cleanup_mode=None)
    database = create_engine(DatabaseSettings(url=server.get_uri()))
    yield create_sessionmaker(database)
    await database.dispose()
