"""The README's main job, run as a user would: everything over HTTP, twice, the second time reusing the first."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil

from tests.service import ROOT, free_port


def run_demo(url: str, data: Path) -> str:
    done = subprocess.run(
        [sys.executable, "examples/demo.py", "--url", url],
        cwd=ROOT,
        env={**os.environ, "HEADWATER_DATA_DIR": str(data), "COLUMNS": "118"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_demo_answers_and_is_reused(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    try:
        first = run_demo(url, tmp_path / "data")
        second = run_demo(url, tmp_path / "data")
    finally:
        stop_services(port)
    for text in ("demo-ekfac", "demo-trak", "most positive training examples", "Forgetting vendor-4", f"{url}/docs"):
        assert text in first
    check_predictions(first)
    assert "already running" in second
    assert "import mnist-train" not in second

    def tail(output: str) -> str:
        return output[output.index("Test digit") : output.index("Done in")]

    assert tail(first) == tail(second)


def numbers(output: str, label: str) -> list[float]:
    """The signed numbers of the last table row that starts with a label."""
    row = [line for line in output.splitlines() if line.startswith(f"│ {label}")][-1]
    return [float(found) for found in re.findall(r"[+-]\d+\.\d+", row)]


def check_predictions(output: str) -> None:
    """Predicted and realised changes agree in sign; their ratio, the slope, is stated in the README and bounded here."""
    for index, bounds in {"demo-ekfac": (0.8, 5.0), "demo-trak": (0.3, 2.0)}.items():
        _, _, predicted, _, realised = numbers(output, index)
        assert predicted < 0
        assert realised < 0
        assert bounds[0] < predicted / realised < bounds[1], (index, predicted, realised)
    ekfac, trak, realised = numbers(output, "mean")
    assert realised < 0
    assert 0.4 < ekfac / realised < 3
    assert 0.2 < trak / realised < 2


def stop_services(port: int) -> None:
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "serve" in command and str(port) in command:
            process.terminate()
            process.wait(40)
