"""The api's composition root; nothing else happens at import."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles

from app.auth.endpoints import router as auth
from app.auth.service import KeyRing
from app.banks.endpoints import router as banks
from app.datasets.endpoints import router as datasets
from app.db.session import create_engine, create_sessionmaker
from app.engine.client import EngineClient
from app.health.endpoints import router as health
from app.indexes.endpoints import router as indexes
from app.jobs.endpoints import router as jobs
from app.jobs.following import Following
from app.models.endpoints import router as models
from app.queries.endpoints import router as queries
from app.replay.endpoints import router as replay
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from app.web import problems
from app.web.docs import STATIC
from app.web.docs import router as docs
from app.web.middleware import KnownHosts, LimitedBody, Observed
from app.web.resources import Resources

_DESCRIPTION = """Which training data is behind a model's behaviour, and what would the model do without it?

Import **datasets**, register a **model** with its **checkpoints**, fit an **index**, then ask it: which examples are behind an output
(*attributions*), what would the outputs be after training on other data (*counterfactuals*), or had some data never been seen (*unlearning*).
Long work is a **job**. Every error is a problem document (RFC 9457) of a stable `type`.
"""


def create_app(settings: Settings, stopping: asyncio.Event | None = None) -> FastAPI:
    """Return the application; connections and the engine start with its lifespan, and it starts without a database too.

    Args:
        settings: the configuration.
        stopping: set by whoever runs the application when it is told to end, before requests are waited for.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = create_engine(settings.database)
        sessions = create_sessionmaker(database)
        artifacts = ArtifactStore(settings.data_dir)
        artifacts.prepare()
        engine = EngineClient(settings.engine)
        app.state.resources = Resources(
            settings,
            database,
            sessions,
            artifacts,
            engine,
            KeyRing(sessions),
            Following(sessions),
            stopping or asyncio.Event(),
        )
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()
            await database.dispose()

    app = FastAPI(
        title="Headwater",
        version=version("headwater"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
        separate_input_output_schemas=False,
    )
    problems.install(app)
    root = APIRouter(prefix="/v1")
    for router in (datasets, models, indexes, queries, replay, banks, jobs, auth):
        root.include_router(router)
    app.include_router(root)
    app.include_router(health)
    app.include_router(docs)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_middleware(LimitedBody, json_bytes=settings.max_body_bytes, upload_bytes=settings.max_upload_bytes)
    app.add_middleware(KnownHosts, allowed=settings.allowed_hosts)
    app.add_middleware(Observed)
    return app


def _operation_id(route: APIRoute) -> str:
    """Name operations after their functions, so that generated clients read well and stay stable."""
    return route.name
