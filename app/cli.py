"""The command `headwater`."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth import service as auth
from app.auth.schemas import SCOPES, Scope
from app.db.embedded import start_embedded
from app.db.migrate import upgrade
from app.db.session import create_engine, create_sessionmaker
from app.errors import Problem
from app.log import configure_logging
from app.main import create_app
from app.settings import Settings
from app.supervisor import StartError, serve_api
from app.supervisor import serve as serve_group

R = TypeVar("R")
app = typer.Typer(help="Headwater: which training data is behind a model's behaviour.", no_args_is_help=True)
keys = typer.Typer(help="API keys. The first key closes the service to callers without one.", no_args_is_help=True)
app.add_typer(keys, name="keys")
Host = Annotated[str, typer.Option(help="Address to listen on; other than loopback needs API keys.")]
Port = Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)]


@app.command()
def serve(host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Run the whole service: embedded Postgres if no URL is set, migrations, one worker and the api."""
    settings = _settings("serve")
    _or_exit(lambda: serve_group(settings, host, port))


@app.command()
def api(host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Run the api alone; needs HEADWATER_DATABASE__URL and a migrated database."""
    settings = _settings("api")
    _or_exit(lambda: serve_api(settings, host, port))


@app.command()
def worker() -> None:
    """Run one worker; needs HEADWATER_DATABASE__URL. Start as many as there are devices."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "app.worker.main"]))


@app.command()
def migrate() -> None:
    """Bring the database's schema to this version."""
    with _Database() as settings:
        upgrade(settings.database)


@app.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    typer.echo(json.dumps(create_app(Settings()).openapi(), indent=1, ensure_ascii=False, sort_keys=True))


@keys.command("create")
def create_key(
    name: str, scope: Annotated[list[str] | None, typer.Option(help=f"One or more of {', '.join(SCOPES)}.")] = None
) -> None:
    """Make a key and print it, once."""
    if not (name.isprintable() and len(name.strip()) >= 1 and len(name) <= 64):
        raise typer.BadParameter("a key's name has 1 to 64 printable characters")
    wanted: list[Scope] = [known for known in SCOPES if known in (scope or ["read", "query"])]
    unknown = set(scope or []) - set(SCOPES)
    if unknown:
        raise typer.BadParameter(f"unknown scope {', '.join(sorted(unknown))}; there are {', '.join(SCOPES)}")
    typer.echo(_in_session(lambda session: auth.create_key(session, name, wanted)))


@keys.command("list")
def list_keys() -> None:
    """List the keys' names, scopes and state; never the keys themselves."""
    for key in _in_session(auth.list_keys):
        state = "revoked" if key.revoked_at else "active"
        typer.echo(f"{key.name}\t{','.join(key.scopes)}\t{state}\t{key.created_at:%Y-%m-%d}")


@keys.command("revoke")
def revoke_key(name: str) -> None:
    """Make a key stop working, within seconds."""
    if not _in_session(lambda session: auth.revoke_key(session, name)):
        typer.echo(f"There is no active key {name!r}.", err=True)
        raise typer.Exit(1)


class _Database:
    """The configured database, or the embedded one for as long as the command runs, migrated."""

    def __enter__(self) -> Settings:
        settings = _settings("cli")
        self._server = None
        if settings.database.url is None:
            self._server, settings.database.url = start_embedded(settings.data_dir)
        return settings

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.cleanup()


def _in_session(action: Callable[[AsyncSession], Awaitable[R]]) -> R:
    async def run(settings: Settings) -> R:
        database = create_engine(settings.database)
        try:
            async with create_sessionmaker(database).begin() as session:
                return await action(session)
        finally:
            await database.dispose()

    with _Database() as settings:
        upgrade(settings.database)
        try:
            return asyncio.run(run(settings))
        except Problem as problem:
            typer.echo(problem.detail, err=True)
            raise typer.Exit(1) from None


def _settings(process: str) -> Settings:
    settings = Settings()
    configure_logging(settings, process)
    return settings


def _or_exit(run: Callable[[], None]) -> None:
    try:
        run()
    except StartError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
