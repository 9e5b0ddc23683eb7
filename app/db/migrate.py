"""Bringing a database's schema to the newest revision, and asking whether it is."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

import migrations
from app.db.session import database_url
from app.settings import DatabaseSettings


def alembic_config(settings: DatabaseSettings) -> Config:
    """Return alembic's configuration for a database."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    url = database_url(settings).render_as_string(hide_password=False)
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def upgrade(settings: DatabaseSettings) -> None:
    """Apply every migration that is missing."""
    command.upgrade(alembic_config(settings), "head")


def newest_revision() -> str | None:
    """Return the revision this code needs."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return ScriptDirectory.from_config(config).get_current_head()


async def current_revision(connection: AsyncConnection) -> str | None:
    """Return the revision a database is at; None if it was never migrated."""
    exists = (await connection.execute(text("SELECT to_regclass('alembic_version')"))).scalar()
    if exists is None:
        return None
    revision: str | None = (await connection.execute(text("SELECT version_num FROM alembic_version"))).scalar()
    return revision
