"""`headwater serve`: embedded Postgres if no URL is set, migrations, one worker and the api, as one supervised group."""

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

import structlog
import uvicorn

from app.auth.service import keys_exist
from app.db.embedded import start_embedded, stop_embedded
from app.db.migrate import upgrade
from app.db.session import create_engine, create_sessionmaker
from app.main import create_app
from app.settings import Settings

log = structlog.get_logger("headwater.serve")
_GRACE_SECONDS = 12
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class StartError(Exception):
    """The service cannot start; the message says what to do."""


def serve(settings: Settings, host: str, port: int) -> None:
    """Run everything until SIGTERM or SIGINT.

    Raises:
        StartError: if another service uses the data folder, or the address needs keys first.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    lock = _locked(settings.data_dir)
    server = None
    if settings.database.url is None:
        server, url = start_embedded(settings.data_dir)
        settings.database.url = url
        os.environ["HEADWATER_DATABASE__URL"] = url
    try:
        upgrade(settings.database)
        asyncio.run(_supervised(settings, host, port))
    finally:
        if server is not None:
            stop_embedded(server)
        lock.close()


def serve_api(settings: Settings, host: str, port: int) -> None:
    """Run the api alone.

    Raises:
        StartError: if the address needs keys first.
    """
    asyncio.run(_api(settings, host, port, asyncio.Event()))


async def _supervised(settings: Settings, host: str, port: int) -> None:
    stopping = asyncio.Event()
    worker = asyncio.create_task(_worker_until(stopping))
    try:
        await _api(settings, host, port, stopping)
    finally:
        stopping.set()
        await worker


async def _worker_until(stopping: asyncio.Event) -> None:
    """Keep a worker until the signal, so that it ends while the api answers what is left."""
    worker = asyncio.create_task(_keep_worker())
    await stopping.wait()
    worker.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await worker


async def _api(settings: Settings, host: str, port: int, stopping: asyncio.Event) -> None:
    if host not in _LOOPBACK and not await _has_keys(settings):
        raise StartError(
            f"Refusing to listen on {host} without API keys: every caller could do everything. "
            "Make one first: headwater keys create NAME --scope admin"
        )
    config = uvicorn.Config(
        create_app(settings, stopping),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        h11_max_incomplete_event_size=32 << 10,
    )
    await _Server(config, stopping).serve()


class _Server(uvicorn.Server):
    """Stops on a signal without raising it again afterwards, so that the database and the worker are stopped in order.

    Args:
        config: of uvicorn.
        stopping: set at the signal.
    """

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Tell whatever waits for something else than its own work, and then end as uvicorn does."""
        self._stopping.set()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ask the server to exit on SIGTERM and SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


async def _has_keys(settings: Settings) -> bool:
    database = create_engine(settings.database)
    try:
        async with create_sessionmaker(database)() as session:
            return await keys_exist(session)
    finally:
        await database.dispose()


async def _keep_worker() -> None:
    """Keep one worker process running."""
    backoff, loop = 0.2, asyncio.get_running_loop()
    while True:
        began = loop.time()
        try:
            log.warning("worker ended", code=await _worker())
        except OSError as error:  # no process or no memory left to start one
            log.error("worker could not be started", error=str(error))
        backoff = 0.2 if loop.time() - began > 10 else min(2 * backoff, 10)
        await asyncio.sleep(backoff)


async def _worker() -> int:
    """Run a worker process until it ends; when cancelled, let it give its leases back."""
    environment = os.environ | {"HEADWATER_SUPERVISED": str(os.getpid())}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "app.worker.main", env=environment)
    try:
        return await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _GRACE_SECONDS)
        except TimeoutError:
            process.kill()
        raise


def _locked(data_dir: Path) -> IO[str]:
    """Hold the data folder for one supervised group at a time."""
    lock = (data_dir / ".serve.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartError(f"Another `headwater serve` uses {data_dir}; stop it, or set HEADWATER_DATA_DIR.") from None
    return lock
