"""LDS of perturbed copies against their noise and number: `python -m benchmarks.perturbation NAME …` measures workloads and prints the study's table.

One checkpoint, the method's default damping. Results are kept in `benchmarks/results/perturbation/<workload>.json`; `--table` prints them and measures nothing.
"""

import argparse
from pathlib import Path
from typing import Any

from attribution_core.processor import set_up_processor
from benchmarks.dampings import Sweep, judged
from benchmarks.lds import read_results, summary, write_results
from benchmarks.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parent / "results" / "perturbation"
# Noise and copies, one changed at a time.
TRIED = ((0.4, 0), (0.2, 9), (0.3, 9), (0.4, 9), (0.5, 9), (0.7, 9), (0.4, 1), (0.4, 4), (0.4, 19))
Found = dict[str, dict[str, list[float]]]


def measure(workload: Workload, kind: str, noise: float, copies: int) -> None:
    """Add one ensemble's LDS, its interval and slope to a workload's results."""
    method: dict[str, Any] = {"type": kind}
    if copies:
        method["perturbation"] = {"noise": noise, "copies": copies}
    ((_, each, slope),) = judged(workload, Sweep(kind, method, (None,)), 1)
    found = read(workload)
    row = found.setdefault(kind, {})[_named(noise, copies)] = summary(each, slope)
    print(workload.name, kind, _named(noise, copies), row, flush=True)
    write_results(RESULTS / f"{workload.name}.json", found)


def read(workload: Workload) -> Found:
    """Return a workload's results: method and ensemble to LDS, its interval, and slope."""
    return read_results(RESULTS / f"{workload.name}.json")


def table() -> str:
    """Return LDS per method and workload, a column for each ensemble."""
    columns = [_named(noise, copies) for noise, copies in TRIED]
    lines = [f"| workload | method | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, workload in WORKLOADS.items():
        for kind, rows in read(workload).items():
            best = max(row[0] for row in rows.values())
            cells = [_cell(rows.get(column), best) for column in columns]
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _named(noise: float, copies: int) -> str:
    return f"σ {noise:g}, {copies} copies" if copies else "none"


def _cell(row: list[float] | None, best: float) -> str:
    if row is None:
        return "–"
    return f"**{row[0]:.3f}**" if row[0] == best else f"{row[0]:.3f}"


def main() -> None:
    """Measure workloads and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--method", nargs="*", default=["ekfac"])
    parser.add_argument("--table", action="store_true", help="print what was measured and measure nothing")
    arguments = parser.parse_args()
    set_up_processor(threads=1)
    for name in [] if arguments.table else arguments.names:
        for kind in arguments.method:
            for noise, copies in TRIED:
                measure(WORKLOADS[name], kind, noise, copies)
    print(table())


if __name__ == "__main__":
    main()
