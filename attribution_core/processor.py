"""How a process that computes uses its processor."""

import os

import torch


def set_up_processor(threads: int | None = None) -> None:
    """Compute with so many threads, all by default, and take numbers below the smallest normal one for zero.

    Solved queries fade below 1e-38 in directions of large curvature; products with such numbers are done in microcode, several times as slowly, and none is
    seen in a score. Holds for threads that are started afterwards too. Processors that cannot do so compute as before.
    """
    torch.set_num_threads(threads or os.cpu_count() or 1)
    torch.set_flush_denormal(True)
