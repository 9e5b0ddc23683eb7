"""The api's side of the engine: starts the child, feeds it through a bounded queue, replaces it when it dies or hangs. Free of torch."""

import asyncio
import contextlib
import itertools
import sys
import time
from typing import Any

import structlog

from app.engine.frames import BEAT_SECONDS, LENGTH, decoded, encoded
from app.errors import CorruptArtifact, EngineBusy, EngineUnavailable, FieldProblem, InvalidRequest, Problem
from app.settings import EngineSettings
from app.telemetry import ENGINE_QUEUE, ENGINE_RESTARTS, ENGINE_SECONDS

log = structlog.get_logger("headwater.engine")
_MAX_BACKOFF_SECONDS = 10.0
_START_BEATS = 60
# Far more than a busy machine delays them.
_MISSED_BEATS = 30


class EngineClient:
    """Talks to one engine process. A call ends with an answer, or with a problem that says when to try again."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether calls are answered now."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Start the child and keep it running; returns at once, calls wait until it is ready."""
        self._keeper = asyncio.create_task(self._keep_running())

    async def stop(self) -> None:
        """End the child."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def call(self, operation: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Return the engine's answer.

        Raises:
            EngineBusy: if the queue is full.
            EngineUnavailable: if the engine is not there, dies meanwhile, or takes too long.
            InvalidRequest: if the request asks for something impossible.
            CorruptArtifact: if stored files are damaged.
        """
        if len(self._waiting) >= self._settings.queue_limit:
            raise EngineBusy(f"{len(self._waiting)} queries are waiting already.")
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        ENGINE_QUEUE.set(len(self._waiting))
        began = time.perf_counter()
        until = time.monotonic() + self._settings.timeout_seconds  # a clock that the engine shares
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                await self._ready.wait()
                await self._send({"number": number, "until": until, "operation": operation, "payload": payload})
                return _result(await answer)
        except TimeoutError:
            raise EngineUnavailable(f"The engine did not answer within {self._settings.timeout_seconds:g} s.") from None
        except (BrokenPipeError, ConnectionResetError):
            raise EngineUnavailable("The engine has just died; it is being restarted.") from None
        finally:
            self._waiting.pop(number, None)
            ENGINE_QUEUE.set(len(self._waiting))
            ENGINE_SECONDS.labels(operation).observe(time.perf_counter() - began)

    async def _send(self, message: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None or process.returncode is not None:
            raise EngineUnavailable("The engine has just died; it is being restarted.")
        process.stdin.write(encoded(message))
        await process.stdin.drain()

    async def _keep_running(self) -> None:
        backoff = 0.1
        while True:
            began = time.monotonic()
            try:
                await self._run_once()
            except Exception:  # such as no process left to start: whatever it is, the next try may go well
                log.exception("engine could not be run")
            finally:
                self._ready.clear()
                self._fail_waiting()
            backoff = 0.1 if time.monotonic() - began > _MAX_BACKOFF_SECONDS else min(2 * backoff, _MAX_BACKOFF_SECONDS)
            log.warning("engine ended; starting it again", seconds=backoff)
            ENGINE_RESTARTS.inc()
            await asyncio.sleep(backoff)

    async def _run_once(self) -> None:
        """Run one child until it ends."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "app.engine.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        try:
            await _heard(self._process.stdout, _START_BEATS)
            self._ready.set()
            log.info("engine ready", pid=self._process.pid)
            while True:
                message = await _heard(self._process.stdout, _MISSED_BEATS)
                waiting = self._waiting.get(message["number"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
        except asyncio.IncompleteReadError:
            pass
        except TimeoutError:
            log.error("engine hangs; replacing it", pid=self._process.pid)
        finally:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
            await self._process.wait()

    def _fail_waiting(self) -> None:
        for waiting in list(self._waiting.values()):
            if not waiting.done():
                waiting.set_exception(EngineUnavailable("The engine has just died; it is being restarted."))
                waiting.exception()  # seen here too: its caller may have gone


async def _heard(stream: asyncio.StreamReader, beats: int) -> dict[str, Any]:
    """Return the next message.

    Waits are counted rather than seconds: whatever suspended this process may have suspended the engine too.

    Raises:
        TimeoutError: if none came for the time of so many beats.
        IncompleteReadError: if the engine has ended.
    """
    message = asyncio.create_task(_read(stream))
    try:
        for _ in range(beats):
            if (await asyncio.wait([message], timeout=BEAT_SECONDS))[0]:
                return message.result()
        raise TimeoutError
    finally:
        message.cancel()


async def _read(stream: asyncio.StreamReader) -> dict[str, Any]:
    (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
    return decoded(await stream.readexactly(length))


def _result(message: dict[str, Any]) -> dict[str, Any]:
    if "result" in message:
        result: dict[str, Any] = message["result"]
        return result
    error = message["error"]
    kinds: dict[str, type[Problem]] = {"invalid": InvalidRequest, "corrupt": CorruptArtifact}
    kind = kinds.get(error["kind"])
    if kind is None:
        raise RuntimeError(f"the engine failed: {error['detail']}")
    pointer = error.get("pointer")
    raise kind(error["detail"], [FieldProblem(pointer=pointer, detail=error["detail"])] if pointer else None)
