"""What a stored example costs in bytes and is worth in LDS: `python -m benchmarks.stores NAME …` prints the tables of `docs/studies/stores.md`.

With nothing more, types of rows are compared at one width, and bits also at their default one: scores are inner products of stored rows with nothing
re-scored, and `recall` is the share of the exact top 10 of both signs that is among the candidates. With `--frontier`, what each way of storing an
example is worth at its bytes: rows of growing width, and factors.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attribution_core.method_spec import DEFAULT_BITS, DEFAULT_DIM
from attribution_core.method_spec import METHODS as METHOD_SPECS
from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.processor import set_up_processor
from attribution_core.progress import NoProgress
from benchmarks.lds import Truth, interval
from benchmarks.ours import dataset_of, fit_spec, stored_bytes
from benchmarks.workloads import WORKLOADS, Workload, batch_of, prepare

DTYPES = ("float32", "float16", "int8", "binary")
METHODS: tuple[dict[str, Any], ...] = ({"type": "ekfac"}, {"type": "grad_dot"}, {"type": "trak"})
WIDTHS = (512, 1024, 2048, 4096)
MOST = 65_536
FACTORED: tuple[dict[str, Any], ...] = ({"type": "gauss_newton"}, {"type": "ekfac"})


@dataclass(frozen=True)
class Stored:
    """A method, and how its examples are kept."""

    method: dict[str, Any]
    dtype: str
    layout: str = "vectors"


def types_of_rows(methods: list[dict[str, Any]]) -> Iterator[Stored]:
    """Yield every type of row that a method can have, at one width; and bits at theirs."""
    for method in methods:
        exact = METHOD_SPECS[method["type"]].exact_rows
        for dtype in DTYPES[:-1] if exact else DTYPES:
            yield Stored(_projected(method, DEFAULT_DIM), dtype)
        if not exact:
            yield Stored(_projected(method, DEFAULT_BITS), "binary")


def _projected(method: dict[str, Any], dim: int) -> dict[str, Any]:
    return {**method, "projection": {"dim": dim}}


def frontier() -> Iterator[Stored]:
    """Yield what answers from stored numbers alone, from few bytes to many."""
    for dim in WIDTHS:
        fisher = _projected({"type": "trak", "curvature": "fisher"}, dim)
        yield Stored(fisher, "float32")
        yield Stored(fisher, "int8")
        yield Stored(_projected({"type": "trak"}, dim), "float32")
        yield Stored({"type": "logra", "projection": {"type": "factored", "dim": dim}}, "float32")
        yield Stored(_projected({"type": "ekfac"}, dim), "float32")
        yield Stored(_projected({"type": "ekfac"}, dim), "int8")
        yield Stored(_projected({"type": "ekfac"}, min(16 * dim, MOST)), "binary")
        yield Stored(_projected({"type": "gauss_newton"}, min(16 * dim, MOST)), "binary")
    for method in FACTORED:
        for dtype in DTYPES[:-1]:
            yield Stored(method, dtype, "factors")


def row(workload: Workload, stored: Stored, folder: Path) -> str:
    """Fit once and return the table's line."""
    data = prepare(workload)
    store = {"dtype": stored.dtype, "layout": stored.layout}
    spec = fit_spec(workload, dataset_of(workload, data), 1, method=stored.method, store=store, shard_size=4096)
    fit(spec, folder / "work", folder / "index", NoProgress())
    index = LoadedIndex(folder / "index", spec)
    scores = index.scores(index.query(batch_of(data, "query"), None), np.arange(index.num_examples), rescore=False)
    truth = Truth.read(workload.truth)
    correlations = truth.correlations(scores)
    low, high = interval(correlations)
    size = stored_bytes(folder / "index") / index.num_examples
    recall = "–" if index.recall is None else f"{index.recall:.3f}"
    lds = f"{correlations.mean():.3f} ({low:.3f} to {high:.3f})"
    kept = stored.dtype if stored.layout == "vectors" else f"factors, {stored.dtype}"
    return f"| `{json.dumps(stored.method)}` | {kept} | {lds} | {truth.slope(scores):.2f} | {recall} | {size:.0f} |"


def main() -> None:
    """Print a table per workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--methods", type=json.loads, nargs="*", default=list(METHODS))
    parser.add_argument("--frontier", action="store_true")
    set_up_processor(threads=1)
    arguments = parser.parse_args()
    for name in arguments.workloads:
        print(
            f"\n{name}\n\n| method | stored | LDS of what is stored | slope | recall | bytes per example |\n|---|---|---|---|---|---|"
        )
        for stored in frontier() if arguments.frontier else types_of_rows(arguments.methods):
            with tempfile.TemporaryDirectory() as folder:
                print(row(WORKLOADS[name], stored, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
