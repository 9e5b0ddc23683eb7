"""What a crash must not undo."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
