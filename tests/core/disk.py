"""A disk that is full, for tests of what then is said and left."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def small_files(most: int = 100) -> Iterator[int]:
    """Let no file have more bytes than this; what goes beyond fails with EFBIG.

    It holds for every file of the process, also for the log that pytest reports to between the phases of a test: leave it before the
    test ends.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield most
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
