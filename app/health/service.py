"""Checks of everything a request may need."""

from app.db.failures import OUTAGE
from app.db.migrate import current_revision, newest_revision
from app.web.resources import Resources


async def checks(resources: Resources) -> dict[str, str]:
    """Return `ok` or what is wrong, per part."""
    database, migrations = await _database(resources)
    return {
        "database": database,
        "migrations": migrations,
        "storage": "ok" if resources.artifacts.writable() else "the data folder cannot be written",
        "engine": "ok" if resources.engine.ready else "starting",
    }


async def _database(resources: Resources) -> tuple[str, str]:
    try:
        async with resources.database.connect() as connection:
            found = await current_revision(connection)
    except OUTAGE:
        return "not reachable", "unknown"
    return "ok", "ok" if found == newest_revision() else f"at {found}; run headwater migrate"
