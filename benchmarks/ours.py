"""Headwater's methods on a workload: fit, all-pairs scores and their cost, through the library that the service runs.

`python -m benchmarks.ours --workload NAME --method '{"type": "ekfac"}' --checkpoints 1 --out FOLDER` writes `scores-<damping>.npy` and `cost.json`.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef, DatasetRef, FitSpec
from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.pairs import all_scores
from attribution_core.processor import set_up_processor
from attribution_core.progress import NoProgress
from attribution_core.spec import DatasetSpec
from benchmarks.cost import damping_name, damping_of, peak_megabytes, plain_passes
from benchmarks.workloads import WORKLOADS, Workload, batch_of, prepare


def dataset_of(workload: Workload, data: dict[str, np.ndarray]) -> DatasetRef:
    """Return a workload's training set as the service imports it; once, as a data set is imported before anything is fitted to it."""
    folder = workload.folder / "dataset"
    described = folder / "dataset.json"
    if not described.exists():
        described.parent.mkdir(parents=True, exist_ok=True)
        described.write_text(_imported(workload, data, folder).model_dump_json())
    return DatasetRef.model_validate_json(described.read_text())


def _imported(workload: Workload, data: dict[str, np.ndarray], folder: Path) -> DatasetRef:
    from attribution_core.data.importer import import_dataset

    tokens = workload.task == "causal_lm"
    spec = DatasetSpec(
        name="train",
        kind="tokens" if tokens else "tensor",
        target=None if tokens else "target",
        shape=None if tokens else list(data["train_inputs"].shape[1:]),
    )
    source = folder / "train.npz"
    targets = {} if tokens else {"target": data["train_targets"]}
    np.savez(source, input=data["train_inputs"], **targets)
    (folder / "data").mkdir(exist_ok=True)
    summary = import_dataset(source, spec, folder / "data", NoProgress())
    count = len(data["train_inputs"])
    return DatasetRef(id="ds", folder=folder / "data", spec=spec, sha256=summary.sha256, num_examples=count)


def fit_spec(workload: Workload, dataset: DatasetRef, checkpoints: int, **chosen: Any) -> FitSpec:
    """Return the fit of the first checkpoints."""
    paths = [workload.folder / "checkpoints" / f"{number}.safetensors" for number in range(checkpoints)]
    return FitSpec.model_validate(
        {
            "architecture": workload.architecture,
            "task": {"type": workload.task},
            "dataset": dataset,
            "checkpoints": [CheckpointRef(id=path.stem, path=path, sha256=sha256_file(path)) for path in paths],
            "measurement": workload.measurement,
            **chosen,
        }
    )


def run(
    workload: Workload,
    method: dict[str, Any],
    store: dict[str, Any],
    checkpoints: int,
    dampings: list[float | None],
    out: Path,
) -> dict[str, Any]:
    """Fit, score all pairs at every damping, write both, and return the cost; what is timed is the first damping."""
    data = prepare(workload)
    dataset = dataset_of(workload, data)
    shutil.rmtree(out, ignore_errors=True)
    spec = fit_spec(workload, dataset, checkpoints, method=method, store=store, shard_size=4096)
    queries = batch_of({name: value for name, value in data.items() if name.startswith("query")}, "query")
    del data
    began = time.process_time()
    summary = fit(spec, out / "work", out / "index", NoProgress())
    feature_seconds = time.process_time() - began
    index = LoadedIndex(out / "index", spec)
    query_seconds = []
    for damping in dampings:
        began = time.process_time()
        scores = all_scores(index, queries, damping)
        query_seconds.append(time.process_time() - began)
        np.save(out / f"scores-{damping_name(damping)}.npy", scores)
    peak = peak_megabytes()
    plain = plain_passes(workload, prepare(workload))
    cost = {
        "peer": "headwater",
        "method": method,
        "store": store,
        "checkpoints": checkpoints,
        "feature_seconds": feature_seconds,
        "query_seconds": query_seconds[0],
        "plain_train": plain.train,
        "plain_query": plain.query,
        "peak_memory_mb": peak,
        "bytes_per_example": stored_bytes(out / "index") / spec.dataset.num_examples,
        "coverage": summary.coverage["percent"],
    }
    (out / "cost.json").write_text(json.dumps(cost, indent=1))
    return cost


def stored_bytes(index: Path) -> int:
    """Return the bytes of an index's rows and gradients."""
    folders = (index / "features", index / "gradients")
    return sum(path.stat().st_size for folder in folders if folder.exists() for path in folder.iterdir())


def main() -> None:
    """Run one method on one workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", required=True, choices=WORKLOADS)
    parser.add_argument("--method", type=json.loads, required=True)
    parser.add_argument("--store", type=json.loads, default={})
    parser.add_argument("--checkpoints", type=int, default=1)
    parser.add_argument("--damping", type=damping_of, nargs="*", default=[None])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    set_up_processor(arguments.threads)
    cost = run(
        WORKLOADS[arguments.workload],
        arguments.method,
        arguments.store,
        arguments.checkpoints,
        arguments.damping,
        arguments.out,
    )
    print(json.dumps(cost))


if __name__ == "__main__":
    main()
