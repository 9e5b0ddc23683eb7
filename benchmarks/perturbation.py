"""LDS of perturbed copies against their noise and number, and with `--trained` of copies that are trained, against how they are.

`python -m benchmarks.perturbation NAME …` measures workloads or their variants and prints the study's table. One checkpoint, the method's default damping.
Results are kept in `benchmarks/results/perturbation/<workload>.json` (or `trained-copies`); `--table` prints them and measures nothing.
"""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from attribution_core.processor import set_up_processor
from benchmarks.dampings import KNOWN, Sweep, judged
from benchmarks.lds import read_results, summary, write_results
from benchmarks.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parent / "results"
Found = dict[str, dict[str, list[float]]]


def _noisy(noise: float, copies: int) -> tuple[str, dict[str, Any]]:
    return f"σ {noise:g}, {copies} copies", {"noise": noise, "copies": copies}


def _trained(noise: float, copies: int, epochs: int, step: float) -> tuple[str, dict[str, Any]]:
    training = {"epochs": epochs, "step": step}
    label = f"σ {noise:g}, {copies} copies, {epochs} epochs, step {step:g}"
    return label, {"noise": noise, "copies": copies, "training": training}


# One of noise, copies, epochs and step is changed at a time.
PLAIN: dict[str, dict[str, Any] | None] = {"none": None}
NOISY = PLAIN | dict(
    _noisy(*each) for each in ((0.2, 9), (0.3, 9), (0.4, 9), (0.5, 9), (0.7, 9), (0.4, 1), (0.4, 4), (0.4, 19))
)
TRAINED = PLAIN | dict(
    (
        _noisy(0.5, 9),
        *(_trained(noise, 9, 4, 0.02) for noise in (1, 2, 4)),
        *(_trained(2, 9, epochs, 0.02) for epochs in (1, 2, 8)),
        *(_trained(2, 9, 4, step) for step in (0.01, 0.04)),
        _trained(2, 4, 4, 0.02),
        _trained(2, 19, 4, 0.02),
    )
)


def measure(workload: Workload, kind: str, label: str, perturbation: dict[str, Any] | None, results: Path) -> None:
    """Add one ensemble's LDS, its interval and slope to a workload's results, in one file: method and ensemble to these numbers."""
    ((_, each, slope),) = judged(workload, Sweep(kind, {"type": kind, "perturbation": perturbation}, (None,)), 1)
    found: Found = read_results(results)
    row = found.setdefault(kind, {})[label] = summary(each, slope)
    print(workload.name, kind, label, row, flush=True)
    write_results(results, found)


def table(columns: Collection[str], results: Path) -> str:
    """Return LDS per method and workload, a column for each ensemble."""
    lines = [f"| workload | method | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name in KNOWN:
        for kind, rows in read_results(results / f"{name}.json").items():
            shown = [rows.get(column) for column in columns]
            best = max((row[0] for row in shown if row), default=0.0)
            lines.append(f"| {name} | {kind} | {' | '.join(_cell(row, best) for row in shown)} |")
    return "\n".join(lines)


def _cell(row: list[float] | None, best: float) -> str:
    if row is None:
        return "–"
    return f"**{row[0]:.3f}**" if row[0] == best else f"{row[0]:.3f}"


def main() -> None:
    """Measure workloads and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--method", nargs="*", default=["ekfac"])
    parser.add_argument("--trained", action="store_true", help="copies that are trained")
    parser.add_argument("--only", nargs="*", help="labels of the columns to measure")
    parser.add_argument("--table", action="store_true", help="print what was measured and measure nothing")
    arguments = parser.parse_args()
    set_up_processor(threads=1)
    columns, folder = (TRAINED, "trained-copies") if arguments.trained else (NOISY, "perturbation")
    for name in [] if arguments.table else arguments.names:
        for kind in arguments.method:
            for label in arguments.only or columns:
                measure(KNOWN[name], kind, label, columns[label], RESULTS / folder / f"{name}.json")
    print(table(columns, RESULTS / folder))


if __name__ == "__main__":
    main()
