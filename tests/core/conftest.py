import resource
from collections.abc import Iterator

import pytest


@pytest.fixture
def small_files() -> Iterator[int]:
    """Let no file have more bytes than this, as on a disk that is full; what goes beyond fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield 100
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
