"""Giving memory back to the system."""

import ctypes
import sys


def release_freed() -> None:
    """Return freed memory to the system where the C library would keep it, as glibc does of blocks below its threshold for mapping.

    What one pass kept for the next would else count as used for as long as the process lives.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
