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
    for text in (
        "demo-ekfac",
        "demo-trak",
        "training examples behind the margin",
        "Forgetting vendor-4",
        f"{url}/docs",
    ):
        assert text in first
    check_predictions(first)
    assert "already running" in second
    for done in ("import mnist-train", "train digit-cnn", "measure demo-ekfac", "verify demo-ekfac"):
        assert done in first
        assert done not in second

    def tail(output: str) -> str:
        return output[output.index("Model digit-cnn") : output.index("Done in")]

    assert tail(second) == re.sub(r"^(measure|verify) demo.*\n", "", tail(first), flags=re.MULTILINE)


def numbers(output: str, label: str) -> list[float]:
    """The signed numbers of the last table row that starts with a label."""
    row = [line for line in output.splitlines() if line.startswith(f"│ {label}")][-1]
    return [float(found) for found in re.findall(r"[+-]?\d+\.\d+", row)]


def check_predictions(output: str) -> None:
    """The model is good, its explanations are measured, and predicted and realised changes agree."""
    assert float(re.findall(r"([\d.]+)% of the test margins above 0", output)[0]) > 90
    for name in ("demo-ekfac", "demo-trak"):
        (lds,) = re.findall(rf"Quality {name}: LDS (-?[\d.]+)", output)
        assert float(lds) > 0.1, name
    predicted, low, high, realised, _ = numbers(output, "on the first half")
    assert low <= predicted <= high
    assert low - 1 < realised < high + 1
    predicted, realised, _ = numbers(output, "without its 50 most positive")
    assert predicted < 0
    assert realised < 0
    ekfac, trak, realised = numbers(output, "mean")
    assert max(ekfac, trak, realised) < 0


def stop_services(port: int) -> None:
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "serve" in command and str(port) in command:
            process.terminate()
            process.wait(40)
