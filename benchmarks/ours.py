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
import torch

from attribution_core.data.importer import import_dataset
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef, DatasetRef, FitSpec
from attribution_core.methods.fit import fit
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress
from attribution_core.spec import DatasetSpec
from benchmarks.cost import Plain, peak_megabytes, plain_passes
from benchmarks.workloads import WORKLOADS, Workload, batch_of, prepare


def dataset_of(workload: Workload, data: dict[str, np.ndarray], folder: Path) -> DatasetRef:
    """Import a workload's training set as the service would."""
    tokens = workload.task == "causal_lm"
    spec = DatasetSpec(
        name="train",
        kind="tokens" if tokens else "tensor",
        target=None if tokens else "target",
        shape=None if tokens else list(data["train_inputs"].shape[1:]),
    )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    source = folder / "train.npz"
    targets = {} if tokens else {"target": data["train_targets"]}
    np.savez(source, input=data["train_inputs"], **targets)
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
    dampings: list[float],
    out: Path,
) -> dict[str, Any]:
    """Fit, score all pairs at every damping, write both, and return the cost."""
    data = prepare(workload)
    shutil.rmtree(out, ignore_errors=True)
    dataset = dataset_of(workload, data, out / "dataset")
    spec = fit_spec(workload, dataset, checkpoints, method=method, store=store, shard_size=4096)
    before = peak_megabytes()
    plain: Plain = plain_passes(workload, data)
    began = time.process_time()
    summary = fit(spec, out / "work", out / "index", NoProgress())
    feature_seconds = time.process_time() - began
    index = LoadedIndex(out / "index", spec)
    rows, query_seconds = np.arange(spec.dataset.num_examples), []
    for damping in dampings or [None]:
        began = time.process_time()
        scores = index.scores(index.query(batch_of(data, "query"), damping), rows, rescore=True)
        query_seconds.append(time.process_time() - began)
        np.save(out / f"scores-{damping if damping is not None else 'default'}.npy", scores)
    cost = {
        "peer": "headwater",
        "method": method,
        "store": store,
        "checkpoints": checkpoints,
        "feature_seconds": feature_seconds,
        "query_seconds": float(np.median(query_seconds)),
        "plain_train": plain.train,
        "plain_query": plain.query,
        "peak_memory_mb": peak_megabytes(),
        "before_memory_mb": before,
        "bytes_per_example": _stored_bytes(out / "index") / spec.dataset.num_examples,
        "coverage": summary.coverage["percent"],
    }
    (out / "cost.json").write_text(json.dumps(cost, indent=1))
    shutil.rmtree(out / "dataset")
    return cost


def _stored_bytes(index: Path) -> int:
    folders = (index / "features", index / "gradients")
    return sum(path.stat().st_size for folder in folders if folder.exists() for path in folder.iterdir())


def main() -> None:
    """Run one method on one workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", required=True, choices=WORKLOADS)
    parser.add_argument("--method", type=json.loads, required=True)
    parser.add_argument("--store", type=json.loads, default={})
    parser.add_argument("--checkpoints", type=int, default=1)
    parser.add_argument("--damping", type=float, nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
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
