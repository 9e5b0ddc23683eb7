"""Deterministic division of a training set into shards."""


def shard_ranges(total: int, size: int) -> list[tuple[int, int]]:
    """Split `range(total)` into consecutive `(start, stop)` ranges of at most `size` rows.

    The division depends on nothing but its arguments, so every worker agrees on it.

    Raises:
        ValueError: if `total` is negative or `size` is not positive.
    """
    if total < 0 or size < 1:
        raise ValueError(f"cannot split {total} rows into shards of {size}")
    return [(start, min(start + size, total)) for start in range(0, total, size)]
