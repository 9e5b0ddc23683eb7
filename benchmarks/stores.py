"""What each type of stored row costs in LDS and recall, and saves in bytes: `python -m benchmarks.stores mnist-mlp …` prints a table per workload.

Two scores are judged: `stored`, inner products of stored rows with nothing re-scored, and `two stages`, where the 10 best candidates of both signs
are re-scored exactly; there only the candidates matter, so it is judged by `recall`, the share of the exact top 10 that is among them.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribution_core.method_spec import METHODS as METHOD_SPECS
from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress
from benchmarks.lds import Truth, interval
from benchmarks.ours import dataset_of, fit_spec
from benchmarks.workloads import WORKLOADS, Workload, batch_of, prepare

DTYPES = ("float32", "float16", "int8", "binary")
METHODS: tuple[dict[str, Any], ...] = ({"type": "ekfac"}, {"type": "grad_dot"}, {"type": "trak"})


def row(workload: Workload, method: dict[str, Any], dtype: str, folder: Path) -> str:
    """Fit once and return the table's line."""
    data = prepare(workload)
    dataset = dataset_of(workload, data, folder)
    store = {"dtype": dtype, "layout": "vectors"}
    spec = fit_spec(workload, dataset, 1, method=method, store=store, shard_size=4096)
    fit(spec, folder / "work", folder / "index", NoProgress())
    index = LoadedIndex(folder / "index", spec)
    scores = index.scores(index.query(batch_of(data, "query"), None), np.arange(len(index.store)), rescore=False)
    truth = Truth.read(workload.truth)
    correlations = truth.correlations(scores)
    low, high = interval(correlations)
    size = sum(path.stat().st_size for path in (folder / "index" / "features").iterdir()) / len(index.store)
    lds = f"{correlations.mean():.3f} ({low:.3f} to {high:.3f})"
    return f"| `{json.dumps(method)}` | {dtype} | {lds} | {truth.slope(scores):.2f} | {index.recall:.3f} | {size:.0f} |"


def main() -> None:
    """Print a table per workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--methods", type=json.loads, nargs="*", default=list(METHODS))
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    for name in arguments.workloads:
        print(
            f"\n{name}\n\n| method | rows | LDS of stored rows | slope | recall | bytes per example |\n|---|---|---|---|---|---|"
        )
        for method in arguments.methods:
            for dtype in DTYPES[:-1] if METHOD_SPECS[method["type"]].exact_rows else DTYPES:
                with tempfile.TemporaryDirectory() as folder:
                    print(row(WORKLOADS[name], method, dtype, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
