"""The first search stage at scale: recall, latency, bytes and build time of every kind of index, as ratios to the exhaustive one.

`make bench-search` (`python -m benchmarks.search --rows 1000000 --dim 512`) prints a table per set of rows and writes it to
`benchmarks/results/search.json`, where sets and sizes of other runs stay. Both sets are made once, into `benchmarks/.cache/search`:

* `gradients`: real features. Loss gradients of the workload mnist-mlp's first checkpoint at digits that are made brighter and noisy and sometimes
  shifted at random (2 % get a wrong label), projected; queries are margin gradients of other such digits, preconditioned with the rows' own second moment.
  Lengths span orders of magnitude, as those of gradients do.
* `clusters`: 4,096 clusters in 64 of the dimensions, log-normal lengths (σ = 0.5), white noise in all dimensions of a tenth of the energy;
  queries are made the same way from the same clusters.

A third set, `bits`, is of rows as whitened sketches are stored: 16,384 random signs each (`--bits`), of log-normal sizes. They have one kind of index.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from safetensors.torch import load_file

from attribution_core.data.batch import Batch
from attribution_core.features.rows import decoded
from attribution_core.gradients import GradientCapture
from attribution_core.method_spec import ProjectionSpec
from attribution_core.processor import set_up_processor
from attribution_core.projection import build_projection
from attribution_core.search.exact import BlockSearch
from attribution_core.search.faiss_index import VectorIndex
from attribution_core.spec import SearchSpec
from benchmarks.data import CACHE, load
from benchmarks.workloads import WORKLOADS, prepare

FOLDER = CACHE / "search"
RESULTS = Path(__file__).parent / "results" / "search.json"
QUERIES = 256
TOP = 100
_CHUNK = 4096
_BATCH = 64
_SINGLES = 30


def gradients(n: int, dim: int) -> Iterator[np.ndarray]:
    """Yield queries, then rows, of real gradients."""
    workload = WORKLOADS["mnist-mlp"]
    prepare(workload)
    module = workload.build()
    module.load_state_dict(load_file(workload.folder / "checkpoints" / "0.safetensors"))
    capture, task = GradientCapture(module.eval()), workload.built_task()
    projection = build_projection(ProjectionSpec(dim=dim))
    generator = np.random.default_rng(0)
    found = load("mnist")
    images = (found["images"].astype(np.float32) / 255).reshape(-1, 14, 2, 14, 2).mean((2, 4))
    mean, std = images.mean(), images.std()

    def features(count: int, measurement: str | None) -> np.ndarray:
        chosen = generator.integers(0, len(images), count)
        shift = generator.integers(-1, 2, (count, 2)) * (generator.random((count, 1)) < 0.2)
        places = (np.arange(14) + shift[:, :, None]) % 14
        moved = images[chosen[:, None, None], places[:, 0, :, None], places[:, 1, None, :]]
        moved = moved * generator.uniform(0.6, 1.2, (count, 1, 1)) + generator.normal(0, 0.05, moved.shape)
        wrong = generator.random(count) < 0.02
        labels = np.where(wrong, generator.integers(0, 10, count), found["labels"][chosen])
        inputs = torch.from_numpy(((moved - mean) / std).reshape(count, -1).astype(np.float32))
        batch = Batch(torch.arange(count), inputs, torch.from_numpy(labels))
        run = capture.run(batch.forward, count)
        if measurement is None:
            return -projection.project_gradients(run.gradients(task.loss(run.output, batch))).numpy()
        return projection.project_gradients(run.gradients(task.measure(run.output, batch, measurement))).numpy()

    sample = np.concatenate([features(_CHUNK, None) for _ in range(10)]).astype(np.float64)
    moment = sample.T @ sample / len(sample)
    damped = moment + 0.1 * np.trace(moment) / dim * np.eye(dim)
    yield np.linalg.solve(damped, features(QUERIES, "margin").T.astype(np.float64)).T.astype(np.float32)
    for start in range(0, n, _CHUNK):
        yield features(min(_CHUNK, n - start), None)


def clusters(n: int, dim: int) -> Iterator[np.ndarray]:
    """Yield queries, then rows, of clusters in a subspace."""
    generator = np.random.default_rng(0)
    rank = min(64, dim)
    basis = np.linalg.qr(generator.normal(size=(dim, rank)))[0].astype(np.float32)
    spectrum = (np.arange(1, rank + 1) ** -0.5).astype(np.float32)
    centres = generator.normal(size=(4096, rank)).astype(np.float32)

    def features(count: int) -> np.ndarray:
        latent = centres[generator.integers(0, len(centres), count)]
        latent = (latent + 0.7 * generator.normal(size=latent.shape)) * spectrum
        noise = generator.normal(size=(count, dim)) * np.linalg.norm(latent, axis=1).mean() * (0.1 / dim) ** 0.5
        lengths = np.exp(0.5 * generator.normal(size=(count, 1)))
        return ((latent @ basis.T + noise) * lengths).astype(np.float32)

    yield features(QUERIES)
    for start in range(0, n, _CHUNK):
        yield features(min(_CHUNK, n - start))


SETS: dict[str, Callable[[int, int], Iterator[np.ndarray]]] = {"gradients": gradients, "clusters": clusters}


def made(name: str, n: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return queries and mapped rows, made at the first call."""
    path = FOLDER / f"{name}-{n}-{dim}.f32"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            for part in SETS[name](n, dim):
                file.write(np.ascontiguousarray(part).tobytes())
        partial.rename(path)
    stored = np.memmap(path, np.float32, "r", shape=(QUERIES + n, dim))
    return np.array(stored[:QUERIES]), stored[QUERIES:]


def bits(n: int, dim: int) -> np.ndarray:
    """Return mapped packed signs (n, dim / 8), made at the first call."""
    path = FOLDER / f"bits-{n}-{dim}.u8"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(0)
        with path.with_suffix(".partial").open("wb") as file:
            for start in range(0, n, _CHUNK):
                file.write(generator.bytes(min(_CHUNK, n - start) * dim // 8))
        path.with_suffix(".partial").rename(path)
    return np.memmap(path, np.uint8, "r", shape=(n, dim // 8))


class Rows:
    """Mapped rows, as an index reads them."""

    sizes: np.ndarray | None = None

    def signs(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield nothing: these rows are no bits."""
        yield from ()

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self.dim = rows, rows.shape[1]

    def __len__(self) -> int:
        return len(self._rows)

    def weighted_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(first row, rows)`."""
        for start in range(0, len(self._rows), _CHUNK):
            yield start, np.asarray(self._rows[start : start + _CHUNK])

    def read_weighted(self, rows: np.ndarray) -> np.ndarray:
        """Return some rows."""
        return np.asarray(self._rows[rows])


class BitRows(Rows):
    """Mapped signs with a size per row, as an index reads them."""

    def __init__(self, packed: np.ndarray) -> None:
        super().__init__(packed)
        self.dim = 8 * packed.shape[1]
        self.sizes = np.exp(0.5 * np.random.default_rng(1).normal(size=len(packed))).astype(np.float32)

    def weighted_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(first row, rows)`."""
        for start in range(0, len(self._rows), _CHUNK // 16):
            yield start, self._decoded(slice(start, start + _CHUNK // 16))

    def read_weighted(self, rows: np.ndarray) -> np.ndarray:
        """Return some rows."""
        return self._decoded(rows)

    def signs(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(first row, packed signs)`."""
        for start in range(0, len(self._rows), _CHUNK):
            yield start, np.asarray(self._rows[start : start + _CHUNK])

    def _decoded(self, chosen: np.ndarray | slice) -> np.ndarray:
        assert self.sizes is not None
        return decoded(np.asarray(self._rows[chosen]), self.sizes[chosen], np.array([self.dim]))


def measured(spec: SearchSpec, rows: Rows, queries: np.ndarray, wanted: np.ndarray | None) -> dict[str, Any]:
    """Build one index and return its cost and what it found, (2, queries, top): for the queries and their negatives."""
    began = time.process_time()
    index = VectorIndex.build(spec, rows)
    build_seconds = time.process_time() - began
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        index.write(Path(folder) / "index")
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    found, batches, singles = [], [], []
    for start in range(0, len(queries), _BATCH):
        part = queries[start : start + _BATCH]
        began = time.process_time()
        found.append([index.search(sign * part, TOP).rows for sign in (1, -1)])
        batches.append((time.process_time() - began) / len(part))
    for query in queries[:_SINGLES, None]:
        began = time.process_time()
        for sign in (1, -1):
            index.search(sign * query, TOP)
        singles.append(time.process_time() - began)
    both = np.concatenate(found, axis=1)  # (2, queries, top)
    exact = both if wanted is None else wanted
    shares = [[np.isin(a, b).mean() for a, b in zip(*pair, strict=True)] for pair in zip(exact, both, strict=True)]
    return {
        "search": spec.model_dump(exclude_defaults=True) or {"type": "flat"},
        "recall_positive": float(np.mean(shares[0])),
        "recall_negative": float(np.mean(shares[1])),
        "single_seconds": float(np.median(singles)),
        "batch_seconds": float(np.median(batches)),
        "bytes_per_row": size / len(rows),
        "build_seconds": build_seconds,
        "found": both,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a table, with ratios to the first in brackets."""
    lines = [
        f"| search | recall@{TOP} + / − | one query, ms | query in a batch of {_BATCH}, ms | bytes per row | build, s |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        numbers = (("single_seconds", 1e3), ("batch_seconds", 1e3), ("bytes_per_row", 1.0), ("build_seconds", 1.0))
        cells = [f"{scale * result[key]:.4g} ({result[key] / results[0][key]:.3g}×)" for key, scale in numbers]
        recall = f"{result['recall_positive']:.3f} / {result['recall_negative']:.3f}"
        lines.append(f"| `{json.dumps(result['search'])}` | {recall} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(name: str, queries: int, rows: Rows, results: list[dict[str, Any]]) -> None:
    """Put one set's results into the file, in place of a former run's of the same size."""
    written = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = [{key: value for key, value in result.items() if key != "found"} for result in results]
    measured = {"rows": len(rows), "dim": rows.dim, "queries": queries, "top": TOP, "batch": _BATCH, "results": kept}
    RESULTS.write_text(json.dumps(written | {f"{name}-{len(rows)}-{rows.dim}": measured}, indent=1) + "\n")


def measure(name: str, rows: Rows, queries: np.ndarray, searches: list[dict[str, Any]]) -> None:
    """Measure and print one set's searches, the first of which finds what the others should."""
    results: list[dict[str, Any]] = []
    for search in searches:
        wanted = results[0]["found"] if results else None
        if rows.sizes is not None:
            every = BlockSearch(rows)
            wanted = np.stack([every.search(sign * queries, TOP).rows for sign in (1, -1)])
        results.append(measured(SearchSpec(**search), rows, queries, wanted))
        write(name, len(queries), rows, results)
        gc.collect()
        print(f"{name}, {len(rows):,} rows of {rows.dim}\n\n{table(results)}\n", flush=True)


def main() -> None:
    """Measure every kind of index on every set of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--bits", type=int, default=16_384)
    parser.add_argument("--sets", nargs="*", default=[*SETS, "bits"], choices=[*SETS, "bits"])
    parser.add_argument("--searches", type=json.loads, nargs="*", default=[{"type": "ivf"}, {"type": "ivfpq"}])
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    set_up_processor(threads=1)
    for name in arguments.sets:
        if name == "bits":
            signs = BitRows(bits(arguments.rows, arguments.bits))
            asked = np.random.default_rng(2).normal(size=(min(arguments.queries, _BATCH), signs.dim)).astype(np.float32)
            measure(name, signs, asked, [{"type": "flat"}])
            continue
        queries, mapped = made(name, arguments.rows, arguments.dim)
        measure(name, Rows(mapped), queries[: arguments.queries], [{"type": "flat"}, *arguments.searches])


if __name__ == "__main__":
    main()
