"""What a process that computes does with numbers that are too small to matter, whichever thread has them."""

import subprocess
import sys

PROGRAM = """
import threading
import torch
from attribution_core.processor import set_up_processor

def products():
    return [int((torch.full((count,), 1e-30) * 1e-10).count_nonzero()) for count in (1, 1_000_000)]

print(products())
set_up_processor(threads=2)
print(torch.get_num_threads(), products(), torch.tensor(2e-38).item() > 0)
thread = threading.Thread(target=lambda: print(products()))
thread.start()
thread.join()
"""


def test_subnormal_numbers_are_zero_in_every_thread() -> None:
    """In a process of its own, as Hypothesis does not run where they are."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["[1, 1000000]", "2 [0, 0] True", "[0, 0]"]
