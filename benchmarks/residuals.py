"""LDS against the power of residuals: `python -m benchmarks.residuals NAME …` measures workloads and their variants, and prints the study's table.

Everything is at the default damping. Results are kept in `benchmarks/results/residuals/<workload>.json`; `--table` prints them and measures nothing.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attribution_core.processor import set_up_processor
from benchmarks.dampings import KNOWN, Sweep, judged
from benchmarks.lds import read_results, summary, write_results
from benchmarks.variants import VARIANTS
from benchmarks.workloads import Workload

RESULTS = Path(__file__).parent / "results" / "residuals"
POWERS = (1.0, 0.8, 0.7, 0.6, 0.5, 0.4)
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "ekfac, 1 checkpoint": ({"type": "ekfac"}, 1),
    "ekfac, 5 checkpoints": ({"type": "ekfac"}, 5),
    "gauss_newton, 1 checkpoint": ({"type": "gauss_newton"}, 1),
}


def measure(workload: Workload) -> None:
    """Add every method that is measured on a workload to its results."""
    path = RESULTS / f"{workload.name}.json"
    found = read_results(path)
    for label, (method, checkpoints) in METHODS.items():
        if checkpoints > 1 and (workload.name in VARIANTS or workload.name == "letter-logistic"):
            continue
        for power in POWERS:
            ((_, each, slope),) = judged(
                workload, Sweep(label, {**method, "residual_power": power}, (None,)), checkpoints
            )
            found.setdefault(label, {})[f"{power:g}"] = summary(each, slope)
            print(workload.name, label, power, found[label][f"{power:g}"], flush=True)
            write_results(path, found)


def table() -> Iterator[str]:
    """Yield the lines of a table of LDS, and slopes in brackets."""
    yield f"| method | workload | {' | '.join(f'q = {power:g}' for power in POWERS)} |"
    yield "|---" * (2 + len(POWERS)) + "|"
    for label in METHODS:
        for name in KNOWN:
            rows = read_results(RESULTS / f"{name}.json").get(label)
            if rows:
                best = max(row[0] for row in rows.values())
                cells = (_cell(rows[f"{power:g}"], best) for power in POWERS)
                yield f"| {label} | {name} | {' | '.join(cells)} |"


def _cell(row: list[float], best: float) -> str:
    lds, slope = f"{row[0]:.3f}", f"({row[3]:.2g})"
    return f"**{lds}** {slope}" if row[0] == best else f"{lds} {slope}"


def main() -> None:
    """Measure workloads and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    classifiers = [name for name, workload in KNOWN.items() if workload.task == "classification"]
    parser.add_argument("names", nargs="*", default=classifiers)
    parser.add_argument("--table", action="store_true", help="print what was measured and measure nothing")
    arguments = parser.parse_args()
    set_up_processor(threads=1)
    for name in [] if arguments.table else arguments.names:
        measure(KNOWN[name])
    print("\n".join(table()))


if __name__ == "__main__":
    main()
