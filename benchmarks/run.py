"""`make bench`: every method of `plan.py` on every workload, each in a process of its own, judged by real retraining, written down.

Results go to `benchmarks/results/<workload>.json` and from there to `docs/benchmarks.md`. Rows that a run does not choose stay as the file has them, so the
table can be filled by many runs, none of which needs what another left in the cache. `--resume` takes measurements of the chosen rows from the cache.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cost import damping_name, damping_of
from benchmarks.data import CACHE
from benchmarks.environment import build_peers
from benchmarks.lds import Truth, interval
from benchmarks.ours import dataset_of
from benchmarks.plan import ENTRIES, Damping, Entry
from benchmarks.report import NOT_MEASURED, write_report
from benchmarks.workloads import WORKLOADS, Workload, prepare, retrain

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).parent.parent


def folder_of(entry: Entry, workload: Workload, checkpoints: int) -> Path:
    """Return where an entry's measurement is."""
    label = re.sub(r"\W+", "-", f"{entry.peer}-{entry.label}")
    return CACHE / "runs" / workload.name / f"{label}-{checkpoints}"


def _chosen(entry: Entry, former: dict[str, Any], chosen: argparse.Namespace) -> bool:
    if chosen.peer and entry.peer not in chosen.peer:
        return False
    if chosen.method and entry.label not in chosen.method:
        return False
    if chosen.missing and former.get("error") != NOT_MEASURED:
        return False
    return not chosen.checkpoints or former["checkpoints"] in chosen.checkpoints


def _named(entry: Entry, checkpoints: int) -> dict[str, Any]:
    return {"peer": entry.peer, "method": entry.label, "options": entry.method, "checkpoints": checkpoints}


def measure(
    entry: Entry, workload: Workload, checkpoints: int, dampings: Sequence[Damping], timeout: int, resume: bool
) -> Path:
    """Run one entry unless it is there and return its folder: `scores-<damping>.npy` and `cost.json`, or `error.txt`."""
    out = folder_of(entry, workload, checkpoints)
    command = [
        *("--workload", workload.name, "--method", json.dumps(entry.method), "--checkpoints", str(checkpoints)),
        *("--damping", *map(damping_name, dampings), "--out", str(out)),
    ]
    stamp = out / "command.json"
    if resume and stamp.exists() and json.loads(stamp.read_text()) == command:
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    python = sys.executable if entry.is_ours else build_peers()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(_ROOT)}
    try:
        done = subprocess.run(
            [str(python), "-m", entry.module, *command],
            env=environment,
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        failed = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        error = (failed or [f"exit code {done.returncode}"])[0] if done.returncode else None
    except subprocess.TimeoutExpired:
        error = f"not finished after {timeout} s"
    if error is not None:
        (out / "error.txt").write_text(error.replace(str(_ROOT), "."))
    stamp.write_text(json.dumps(command))
    return out


def judged(entry: Entry, checkpoints: int, dampings: Sequence[Damping], folder: Path, truth: Truth) -> dict[str, Any]:
    """Return an entry's row: cost, LDS at every damping, and the LDS at a damping that was chosen on other queries."""
    row = _named(entry, checkpoints)
    error = folder / "error.txt"
    if error.exists():
        return row | {"error": error.read_text()}
    row |= {name: value for name, value in json.loads((folder / "cost.json").read_text()).items() if name not in row}
    quality, correlations = {}, {}
    for damping in map(damping_name, dampings):
        scores = np.load(folder / f"scores-{damping}.npy")
        if not np.isfinite(scores).all():
            quality[damping] = {"error": "scores are not finite"}
            continue
        found = np.nan_to_num(truth.correlations(scores))
        correlations[damping] = found
        low, high = interval(found)
        quality[damping] = {"lds": float(found.mean()), "low": low, "high": high, "slope": truth.slope(scores)}
    row["dampings"] = quality
    if correlations:
        row["best"] = max(correlations, key=lambda damping: correlations[damping].mean())
        row["held_out_lds"] = _held_out(list(correlations.values()))
        kept = dict.fromkeys((next(iter(correlations)), row["best"]))
        row["correlations"] = {name: _written(correlations[name]) for name in kept}
    return row


def _written(correlations: np.ndarray) -> str:
    """Return the queries' correlations as a results file has them: what a later run compares another row with, query by query."""
    return " ".join(f"{value:.4f}" for value in correlations)


def _read(row: dict[str, Any]) -> np.ndarray:
    """Return a row's correlations at its best damping, (queries,)."""
    return np.array(row["correlations"][row["best"]].split(), np.float64)


def _held_out(correlations: list[np.ndarray]) -> float:
    """Return the LDS on each half of the queries at the damping that is best on the other half."""
    stacked = np.stack(correlations)
    halves = stacked[:, 0::2], stacked[:, 1::2]
    return float(np.mean([other[one.mean(1).argmax()].mean() for one, other in (halves, halves[::-1])]))


def compared(rows: list[dict[str, Any]], checkpoints: int) -> dict[str, Any]:
    """Return our best method and default against the best peer, with the paired bootstrap interval of the difference."""
    usable = [row for row in rows if row["checkpoints"] == checkpoints and "best" in row]
    sides = [[row for row in usable if (row["peer"] == "headwater") is ours] for ours in (True, False)]
    if not all(sides):
        return {}
    ours, peer = (max(side, key=lambda row: row["dampings"][row["best"]]["lds"]) for side in sides)
    difference = _read(ours) - _read(peer)
    low, high = interval(difference)
    return {
        "ours": {"method": ours["method"], "damping": ours["best"], **ours["dampings"][ours["best"]]},
        "peer": {
            "peer": peer["peer"],
            "method": peer["method"],
            "damping": peer["best"],
            **peer["dampings"][peer["best"]],
        },
        "difference": {"lds": float(difference.mean()), "low": low, "high": high},
    }


def bench(workload: Workload, chosen: argparse.Namespace) -> None:
    """Measure all chosen entries on one workload; its results are written after each."""
    data = prepare(workload)
    retrain(workload, data)
    dataset_of(workload, data)
    truth = Truth.read(workload.truth)
    rows = planned(workload)
    _write(workload, truth, rows)
    for place, (entry, former) in enumerate(rows):
        checkpoints = former["checkpoints"]
        if not _chosen(entry, former, chosen):
            continue
        dampings = _dampings(entry, checkpoints, rows)
        folder = measure(entry, workload, checkpoints, dampings, chosen.timeout, chosen.resume)
        row = judged(entry, checkpoints, dampings, folder, truth)
        rows[place] = entry, row
        _write(workload, truth, rows)
        print(workload.name, entry.peer, entry.label, checkpoints, row.get("error") or row.get("best"), flush=True)


def planned(workload: Workload) -> list[tuple[Entry, dict[str, Any]]]:
    """Return every row of a workload's table with its entry: as the results file has it if its options are still the plan's, else as not measured."""
    path = _results(workload)
    written = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = []
    for entry in ENTRIES:
        if entry.workloads and workload.name not in entry.workloads:
            continue
        for checkpoints in entry.checkpoints:
            if checkpoints > 1 and workload.name == "letter-logistic":
                continue  # the optimum is one, whatever the seed
            named = _named(entry, checkpoints)
            same = (row for row in written if named.items() <= row.items())
            rows.append((entry, next(same, named | {"error": NOT_MEASURED})))
    return rows


def _dampings(entry: Entry, checkpoints: int, rows: list[tuple[Entry, dict[str, Any]]]) -> Sequence[Damping]:
    """Return the dampings to try: the entry's, or once fewer checkpoints were measured the default, their best and its neighbours.

    Three of these are smaller and one is larger, as an ensemble, whose scores are less noisy, tends to need less damping.
    """
    fewer = [row for other, row in rows if other is entry and row["checkpoints"] < checkpoints and "best" in row]
    if not fewer:
        return entry.dampings
    found = {damping_of(name): quality.get("lds", -1.0) for name, quality in fewer[-1]["dampings"].items()}
    grid = sorted(damping for damping in found if damping is not None and damping > 0)
    place = max(range(len(grid)), key=lambda number: found[grid[number]], default=0)
    return tuple(dict.fromkeys((None, damping_of(fewer[-1]["best"]), *grid[max(place - 3, 0) : place + 2])))


def _results(workload: Workload) -> Path:
    return RESULTS / f"{workload.name}.json"


def _write(workload: Workload, truth: Truth, planned_rows: list[tuple[Entry, dict[str, Any]]]) -> None:
    rows = [row for _, row in planned_rows]
    found = {
        "workload": workload.name,
        "n": truth.masks.shape[1],
        "queries": truth.values.shape[2],
        "subsets": truth.values.shape[0],
        "seeds": truth.values.shape[1],
        "ceiling": truth.ceiling(),
        "compared": {str(checkpoints): compared(rows, checkpoints) for checkpoints in (1, 5)},
    }
    RESULTS.mkdir(exist_ok=True)
    _results(workload).write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--peer", nargs="*", help="measure only these libraries")
    parser.add_argument("--method", nargs="*", help="measure only these methods")
    parser.add_argument("--checkpoints", nargs="*", type=int, help="measure only with so many checkpoints")
    parser.add_argument("--missing", action="store_true", help="measure only what the results file has not")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one measurement")
    arguments = parser.parse_args()
    for name in arguments.names:
        bench(WORKLOADS[name], arguments)
    write_report(RESULTS)


if __name__ == "__main__":
    main()
