"""Runs migrations on the database of the settings, in one transaction, giving up soon rather than waiting on a lock."""

from alembic import context
from sqlalchemy import NullPool, create_engine, text

from app.db import tables  # noqa: F401  (defines the tables)
from app.db.base import Base
from app.db.session import database_url
from app.settings import Settings


def _ours(name: str | None, kind: str, *_: object) -> bool:
    """The queue's own tables are not described by our metadata."""
    return not (kind == "table" and name is not None and name.startswith("procrastinate_"))


def run() -> None:
    """Run the migrations that alembic selected."""
    url = context.config.get_main_option("sqlalchemy.url") or database_url(Settings().database)
    with create_engine(url, poolclass=NullPool).connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            include_name=lambda name, kind, _: _ours(name, kind),
            compare_server_default=False,
        )
        with context.begin_transaction():
            connection.execute(text("SET LOCAL lock_timeout = '5s'"))
            context.run_migrations()
        connection.commit()


run()
