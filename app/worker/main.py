"""The worker process: `python -m app.worker.main`, or `headwater worker`. One job at a time; start more for more."""

import asyncio
import contextlib
import faulthandler
import logging
import math
import os
import secrets
import signal
import socket
import time

import structlog

from app.db.failures import OUTAGE
from app.db.session import create_engine, create_sessionmaker, plain_url
from app.jobs.queue import Queue
from app.log import configure_logging
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from app.worker.evaluations import EVALUATION
from app.worker.fits import FIT
from app.worker.imports import IMPORT
from app.worker.runner import Runner
from app.worker.sweeping import sweep_files
from app.worker.trainings import TRAINING
from app.worker.unlearnings import UNLEARNING
from app.worker.verifications import VERIFICATION
from attribution_core.processor import set_up_processor
from attribution_core.projection import check_projections

log = structlog.get_logger("headwater.worker")
_SECONDS_BETWEEN_FILE_SWEEPS = 60.0
# A loop that stands still for so long, and for longer than leases last, does not turn again.
_LEAST_HANG_SECONDS = 60.0


async def work(settings: Settings) -> None:
    """Run jobs until told to stop by SIGTERM or SIGINT; leases are then given back."""
    artifacts = ArtifactStore(settings.data_dir)
    artifacts.prepare()
    database = create_engine(settings.database)
    name = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"
    kinds = {
        "import": IMPORT,
        "fit": FIT,
        "extension": FIT,
        "refresh": FIT,
        "training": TRAINING,
        "evaluation": EVALUATION,
        "verification": VERIFICATION,
        "unlearning": UNLEARNING,
    }
    runner = Runner(settings, create_sessionmaker(database), artifacts, name, kinds)
    hang = max(_LEAST_HANG_SECONDS, 2 * runner.lease_seconds)
    tasks = [
        asyncio.create_task(task) for task in (_receive(settings, runner, name), _sweep(runner), ended_if_hung(hang))
    ]
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    parent = asyncio.create_task(_parent_gone())
    log.info("worker ready", worker=name)
    await asyncio.wait([asyncio.create_task(stop.wait()), parent, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=9)
    await database.dispose()
    log.info("worker stopped", worker=name)


async def _receive(settings: Settings, runner: Runner, name: str) -> None:
    """Receive messages for ever; a lost database is waited for."""
    while True:
        try:
            await Queue(plain_url(settings.database), runner.handle).receive(name)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever the queue raises when its connection dies
            log.warning("queue lost; trying again", error=str(error)[:200])
        await asyncio.sleep(1)


async def _sweep_files(runner: Runner) -> None:
    """Remove files that nothing needs; whatever is wrong with one job must not end the search for abandoned ones."""
    try:
        await sweep_files(runner.sessions, runner.artifacts, runner.settings.worker.keep_failed_hours)
    except OUTAGE:
        raise
    except Exception:
        log.exception("files were not swept")


async def _sweep(runner: Runner) -> None:
    """Look for abandoned jobs, at start and then about once a lease; and now and then for files that nothing needs."""
    swept = -math.inf
    while True:
        with contextlib.suppress(*OUTAGE):
            await runner.sweep()
            if time.monotonic() - swept > _SECONDS_BETWEEN_FILE_SWEEPS:
                swept = time.monotonic()
                await _sweep_files(runner)
        await asyncio.sleep(min(10.0, runner.lease_seconds / 2))


async def ended_if_hung(seconds: float) -> None:
    """Have this process end, telling where its threads are, once its loop has stood still for so long.

    Its leases have lapsed by then, and what started it starts another. It takes no turn of the interpreter, which may be what stands still.
    """
    try:
        while True:
            faulthandler.dump_traceback_later(seconds, exit=True)
            await asyncio.sleep(1)
    finally:
        faulthandler.cancel_dump_traceback_later()


async def _parent_gone() -> None:
    """Return when the supervisor that started this process is gone, perhaps before it got here, so that no worker outlives its service."""
    supervisor = os.environ.get("HEADWATER_SUPERVISED")
    while supervisor in (None, str(os.getppid())):
        await asyncio.sleep(1)


def main() -> None:
    """Start a worker with the environment's settings."""
    settings = Settings()
    configure_logging(settings, "worker")
    check_projections()
    set_up_processor(settings.worker.threads)
    with asyncio.Runner() as runner:
        runner.run(work(settings))
        # A computation that has not stopped by now would be joined; its lease was given back, and what it writes is its attempt's.
        logging.shutdown()
        os._exit(0)


if __name__ == "__main__":
    main()
