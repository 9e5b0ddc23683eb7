"""The engine process: reads requests, answers them one after the other, batches those that ask the same of one index.

Started as `python -m app.engine.process` by the api; standard input and output are its pipes. It ends when its input ends.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import structlog
import torch

from app.engine.cache import IndexCache
from app.engine.frames import BEAT, BEAT_SECONDS, LENGTH, decoded, encoded
from app.engine.operations import Operations
from app.log import configure_logging
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from attribution_core.errors import AttributionError, CorruptArtifactError, FingerprintMismatchError
from attribution_core.processor import set_up_processor
from attribution_core.projection import check_projections

MAX_BATCH = 64
# Of the time that a caller waits, before a batch is taken to hang.
_PATIENCE = 10
log = structlog.get_logger("headwater.engine")
Message = dict[str, Any]


class Answers:
    """The way back to the api, which replaces a process that it does not hear from.

    Beats come from a thread of their own, so a batch may take far longer than its callers wait, such as one that loads a large
    index: later calls need that index too. One that takes longer than `patience` is taken to hang, and beats end.

    Args:
        outputs: the pipe.
        patience: seconds that a batch may take.
    """

    def __init__(self, outputs: BinaryIO, patience: float) -> None:
        self._outputs = outputs
        self._patience = patience
        self._lock = threading.Lock()
        self._began: float | None = None

    def send(self, frame: bytes) -> None:
        """Write a whole frame."""
        with self._lock:
            self._outputs.write(frame)
            self._outputs.flush()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Count the time of a batch."""
        self._began = time.monotonic()
        yield
        self._began = None

    def hangs(self) -> bool:
        """Return whether a batch has taken too long."""
        began = self._began
        return began is not None and time.monotonic() - began > self._patience

    def beat(self) -> None:
        """Send beats until a batch hangs."""
        while not self.hangs():
            self.send(encoded({"number": BEAT}))
            time.sleep(BEAT_SECONDS)


def serve(inputs: BinaryIO, answers: Answers, operations: Operations) -> None:
    """Answer requests until the input ends."""
    waiting: queue.Queue[Message | None] = queue.Queue()
    threading.Thread(target=_read_all, args=(inputs, waiting), daemon=True).start()
    threading.Thread(target=answers.beat, daemon=True).start()
    while (message := waiting.get()) is not None:
        batch = _awaited([message, *_like(message, waiting)])
        with answers.computing():
            found = _answers(operations, batch)
        for answer in found:
            answers.send(_framed(answer))


def _read_all(inputs: BinaryIO, waiting: "queue.Queue[Message | None]") -> None:
    while len(header := inputs.read(LENGTH.size)) == LENGTH.size:
        (length,) = LENGTH.unpack(header)
        waiting.put(decoded(inputs.read(length)))
    waiting.put(None)
    # A computation in progress would only answer nobody.
    os._exit(0)


def _like(first: Message, waiting: "queue.Queue[Message | None]") -> list[Message]:
    """Take the requests already waiting that differ from the first in their queries only; others keep their turn."""
    if first["operation"] != "attribute":
        return []
    wanted = _kind_of(first)
    taken: list[Message] = []
    others: list[Message | None] = []
    while len(taken) < MAX_BATCH - 1:
        try:
            message = waiting.get_nowait()
        except queue.Empty:
            break
        if message is not None and message["operation"] == "attribute" and _kind_of(message) == wanted:
            taken.append(message)
        else:
            others.append(message)
    for message in others:
        waiting.put(message)
    return taken


def _awaited(batch: list[Message]) -> list[Message]:
    """Return the requests whose callers still wait: after a batch that took long, the queue is full of others."""
    now = time.monotonic()
    return [message for message in batch if message["until"] > now]


def _kind_of(message: Message) -> str:
    return json.dumps({key: value for key, value in message["payload"].items() if key != "queries"}, sort_keys=True)


def _answers(operations: Operations, batch: list[Message]) -> list[Message]:
    if len(batch) > 1:
        try:
            results = operations.attribute([message["payload"] for message in batch])
            return [{"number": m["number"], "result": result} for m, result in zip(batch, results, strict=True)]
        except Exception as error:  # one of them is wrong, or all are too much: each gets its own answer
            log.info("batch answered one by one", size=len(batch), reason=type(error).__name__)
    return [_answer(operations, message) for message in batch]


def _answer(operations: Operations, message: Message) -> Message:
    number = message["number"]
    try:
        return {"number": number, "result": operations.run(message["operation"], message["payload"])}
    except (CorruptArtifactError, FingerprintMismatchError) as error:
        return {"number": number, "error": {"kind": "corrupt", "detail": str(error)}}
    except FileNotFoundError as error:  # it was deleted after the question was understood
        return {
            "number": number,
            "error": {"kind": "corrupt", "detail": f"file {Path(error.filename or '').name} is not there"},
        }
    except AttributionError as error:
        return {"number": number, "error": {"kind": "invalid", "detail": str(error), "pointer": error.pointer}}
    except Exception as error:
        log.exception("operation failed", operation=message["operation"])
        return {"number": number, "error": {"kind": "internal", "detail": f"{type(error).__name__}: {error}"}}


def _framed(answer: Message) -> bytes:
    """Return an answer's frame; one that has none (too large, or not all numbers) is refused, as the process must outlive it."""
    try:
        return encoded(answer)
    except ValueError as error:
        return encoded(
            {"number": answer["number"], "error": {"kind": "invalid", "detail": f"there is no answer to give: {error}"}}
        )


def main() -> None:
    """Answer on standard output what is asked on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = Settings()
    configure_logging(settings, "engine")
    check_projections()
    set_up_processor(settings.engine.threads)
    device = settings.engine.device
    used = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    cache = IndexCache(ArtifactStore(settings.data_dir), settings.engine.memory_bytes, used)
    outputs = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # nothing a library prints may end up between frames
    answers = Answers(outputs, _PATIENCE * settings.engine.timeout_seconds)
    serve(sys.stdin.buffer, answers, Operations(cache, settings.limits.rescore_rows))


if __name__ == "__main__":
    main()
