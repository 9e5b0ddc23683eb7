"""Liveness, readiness, version, metrics: outside /v1, without keys."""

from importlib.metadata import version

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.health import service
from app.health.schemas import Alive, Readiness, Version
from app.web.deps import ResourcesDep

router = APIRouter(tags=["health"])


@router.get("/livez", summary="Is the process alive?")
async def livez() -> Alive:
    """Answer as long as the event loop turns; looks at nothing else."""
    return Alive()


@router.get(
    "/readyz",
    summary="Can it answer requests?",
    responses={503: {"model": Readiness, "description": "Not now; `checks` says why."}},
)
async def readyz(response: Response, resources: ResourcesDep) -> Readiness:
    """Check database, migrations, storage and engine."""
    checks = await service.checks(resources)
    ready = all(value == "ok" for value in checks.values())
    if not ready:
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    return Readiness(ready=ready, checks=checks)


@router.get("/version", summary="Which version is it?")
async def get_version() -> Version:
    """Return the version of the service and of its HTTP contract."""
    return Version(version=version("headwater"), api="v1")


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus text."}},
)
async def metrics() -> Response:
    """Return counters and timings in Prometheus' text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
