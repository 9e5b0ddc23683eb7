"""Engines and sessions: psycopg 3 everywhere, dead connections found before use, statements bounded."""

from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from app.settings import DatabaseSettings

SessionMaker = async_sessionmaker[AsyncSession]


def database_url(settings: DatabaseSettings) -> URL:
    """Return the URL with its driver and password.

    Raises:
        ValueError: if no URL is set; the embedded server sets it before anything asks.
    """
    if settings.url is None:
        raise ValueError("HEADWATER_DATABASE__URL is not set, and no embedded server was started")
    url = make_url(settings.url).set(drivername="postgresql+psycopg")
    if settings.password is not None:
        return url.set(password=settings.password.get_secret_value())
    if settings.password_file is not None:
        return url.set(password=settings.password_file.read_text().strip())
    return url


def plain_url(settings: DatabaseSettings) -> str:
    """Return the URL as libpq takes it."""
    return database_url(settings).set(drivername="postgresql").render_as_string(hide_password=False)


def create_engine(settings: DatabaseSettings) -> AsyncEngine:
    """Return an engine that makes connections as they are needed, none before."""
    return create_async_engine(
        database_url(settings),
        pool_size=settings.pool_size,
        max_overflow=settings.pool_size,
        pool_timeout=5,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 5,
            "options": f"-c statement_timeout={settings.statement_timeout_ms} -c timezone=UTC",
        },
    )


def create_sessionmaker(engine: AsyncEngine) -> SessionMaker:
    """Return sessions whose objects stay readable after the boundary's commit."""
    return async_sessionmaker(engine, expire_on_commit=False)
