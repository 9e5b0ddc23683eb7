"""LDS against damping, for every method that has one: `python -m benchmarks.dampings NAME …` measures workloads and prints the study's tables.

Each method is fitted once per number of checkpoints, and scored at every damping and at its default. Results are kept in
`benchmarks/results/dampings/<workload>.json`, so that the tables can be printed without measuring (`--tables`) and sweeps can be measured one by one
(`--only LABEL`). Workloads are the benchmark's and their variants.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.pairs import all_scores
from attribution_core.processor import set_up_processor
from attribution_core.progress import NoProgress
from benchmarks.lds import Truth, read_results, summary, write_results
from benchmarks.ours import dataset_of, fit_spec
from benchmarks.variants import VARIANTS
from benchmarks.workloads import WORKLOADS, Workload, batch_of, prepare, retrain

RESULTS = Path(__file__).parent / "results" / "dampings"
KNOWN: dict[str, Workload] = {**WORKLOADS, **VARIANTS}
Found = dict[str, dict[str, dict[str, list[float]]]]


@dataclass(frozen=True)
class Sweep:
    """One method and the dampings it is tried at."""

    label: str
    method: dict[str, Any]
    dampings: tuple[float | None, ...]


def _derivative(label: str, method: dict[str, Any], dampings: tuple[float | None, ...]) -> Sweep:
    return Sweep(label, {**method, "residual_power": 1}, dampings)


def _gauss_newton(shrinkage: float) -> Sweep:
    return _derivative(
        f"gauss_newton, shrinkage {shrinkage:g}", {"type": "gauss_newton", "shrinkage": shrinkage}, _SOLVES
    )


_EKFAC = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_SOLVES = (0.01, 0.1, 0.3, 1, 3, 10, 30)
_KERNELS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
# Where a default damping is kept among the others.
DEFAULT = "default"
# Residuals are derivatives, but for the first two.
SWEEPS = (
    Sweep("ekfac, tempered residuals", {"type": "ekfac"}, _EKFAC),
    Sweep("gauss_newton, tempered residuals", {"type": "gauss_newton"}, _SOLVES),
    _derivative("ekfac", {"type": "ekfac"}, _EKFAC),
    _derivative("ekfac, axes of positions", {"type": "ekfac", "axes": "positions"}, _EKFAC),
    _derivative("ekfac, Kronecker factors alone", {"type": "ekfac", "axes": "positions", "whole_layers": 0}, _EKFAC),
    _derivative("kfac", {"type": "kfac"}, _EKFAC),
    _derivative("diagonal", {"type": "diagonal"}, _EKFAC),
    *map(_gauss_newton, (0.0, 0.5, 0.8, 0.9)),
    Sweep("trak, kernel of all classes", {"type": "trak", "curvature": "fisher", "projection": {"dim": 2048}}, _KERNELS),
    Sweep("trak", {"type": "trak", "projection": {"dim": 2048}}, _KERNELS),
    Sweep("logra", {"type": "logra", "projection": {"type": "factored", "dim": 2048}}, _KERNELS),
)  # fmt: skip


def judged(workload: Workload, sweep: Sweep, checkpoints: int) -> Iterator[tuple[float, np.ndarray, float]]:
    """Fit once and yield each damping with every query's correlation, and the slope of predicted on true outputs."""
    data = prepare(workload)
    retrain(workload, data)
    truth = Truth.read(workload.truth)
    spec = fit_spec(workload, dataset_of(workload, data), checkpoints, method=sweep.method, shard_size=4096)
    with tempfile.TemporaryDirectory() as folder:
        fit(spec, Path(folder) / "work", Path(folder) / "index", NoProgress())
        index, queries = LoadedIndex(Path(folder) / "index", spec), batch_of(data, "query")
        for damping in sweep.dampings:
            scores = all_scores(index, queries, damping)
            used = index.default_damping if damping is None else damping
            yield used or 0.0, truth.correlations(scores), truth.slope(scores)


def measure(workload: Workload, sweep: Sweep, checkpoints: int) -> None:
    """Add a sweep to a workload's results."""
    found = read(workload)
    every = replace(sweep, dampings=(None, *sweep.dampings))
    for damping, (used, each, slope) in zip(every.dampings, judged(workload, every, checkpoints), strict=True):
        rows = found.setdefault(sweep.label, {}).setdefault(str(checkpoints), {})
        name = DEFAULT if damping is None else f"{damping:g}"
        rows[name] = summary(each, slope) + ([] if damping is not None else [round(used, 6)])
        print(workload.name, sweep.label, checkpoints, name, rows[name], flush=True)
        write_results(RESULTS / f"{workload.name}.json", found)


def read(workload: Workload) -> Found:
    """Return a workload's results: label, number of checkpoints and damping to LDS, its interval, and slope."""
    return read_results(RESULTS / f"{workload.name}.json")


def tables() -> str:
    """Return a table of LDS per sweep and number of checkpoints, and one of the defaults."""
    found = {name: read(workload) for name, workload in KNOWN.items()}
    lines: list[str] = []
    defaults = ["| method | checkpoints | workload | default | LDS there | best | LDS there |", "|---" * 7 + "|"]
    for sweep in SWEEPS:
        for checkpoints in ("1", "5"):
            measured = {
                name: every[sweep.label][checkpoints]
                for name, every in found.items()
                if checkpoints in every.get(sweep.label, {})
            }
            rows = {
                name: {float(d): each[0] for d, each in row.items() if d != DEFAULT} for name, row in measured.items()
            }
            if not rows:
                continue
            dampings = sorted({damping for row in rows.values() for damping in row})
            lines += ["", f"**{sweep.label}, {checkpoints} checkpoint(s)**", ""]
            lines += [f"| workload | {' | '.join(f'{d:g}' for d in dampings)} |", "|---" * (len(dampings) + 1) + "|"]
            lines += [f"| {name} | {' | '.join(_cell(row, d) for d in dampings)} |" for name, row in rows.items()]
            for name, row in measured.items():
                if DEFAULT in row:
                    lds, *_, damping = row[DEFAULT]
                    best = max(rows[name], key=rows[name].__getitem__)
                    defaults.append(
                        f"| {sweep.label} | {checkpoints} | {name} | {damping:.2g} | {lds:.3f} | {best:g} | {rows[name][best]:.3f} |"
                    )
    return "\n".join([*lines, "", *defaults])


def _cell(row: dict[float, float], damping: float) -> str:
    if damping not in row:
        return ""
    text = f"{row[damping]:.3f}"
    return f"**{text}**" if row[damping] == max(row.values()) else text


def main() -> None:
    """Measure workloads and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(KNOWN))
    parser.add_argument("--only", nargs="*", help="labels of the sweeps measured")
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[1])
    parser.add_argument("--dampings", type=float, nargs="*", help="instead of each sweep's own")
    parser.add_argument("--tables", action="store_true", help="print what was measured and measure nothing")
    arguments = parser.parse_args()
    set_up_processor(threads=1)
    for name in [] if arguments.tables else arguments.names:
        for sweep in SWEEPS:
            if arguments.only and sweep.label not in arguments.only:
                continue
            dampings = tuple(arguments.dampings or sweep.dampings)
            for checkpoints in arguments.checkpoints:
                if checkpoints == 1 or name != "letter-logistic":  # its optimum is one, whatever the seed
                    measure(KNOWN[name], Sweep(sweep.label, sweep.method, dampings), checkpoints)
    print(tables())


if __name__ == "__main__":
    main()
