"""Messages between the api and the engine: four bytes of length, then JSON."""

import json
import struct
from typing import Any

MAX_FRAME_BYTES = 512 << 20
LENGTH = struct.Struct(">I")
# The engine says this often that it is alive, also while it computes: by messages with this number, which no question has.
BEAT_SECONDS = 1.0
BEAT = -1


def encoded(message: dict[str, Any]) -> bytes:
    """Return a message's bytes.

    Raises:
        ValueError: if it is larger than a frame may be.
    """
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body):,} bytes is too large")
    return LENGTH.pack(len(body)) + body


def decoded(body: bytes) -> dict[str, Any]:
    """Return the message of a frame's body."""
    message: dict[str, Any] = json.loads(body)
    return message
