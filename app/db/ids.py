"""Ids that sort by creation: a prefix, the time in milliseconds, then randomness, in base 32."""

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_LENGTH = 26


def new_id(prefix: str) -> str:
    """Return a new id such as `ds_01k9…`."""
    number = (time.time_ns() // 1_000_000 << 82) | secrets.randbits(82)
    digits = [_ALPHABET[number >> shift & 31] for shift in range(5 * (_LENGTH - 1), -1, -5)]
    return f"{prefix}_{''.join(digits)}"
