"""How near unlearned checkpoints come to retrained ones: `python -m benchmarks.unlearning`, some minutes on one core.

The workload mnist-mlp by its recipe, ten seeds on everything and ten oracles without the forget set. Two forget sets: `subgroup`, the half of
one digit that lies furthest along its first principal component, and `random`, fifty images of all digits. Seconds are of the processor, for one
checkpoint; the index is fitted once for all.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from attribution_core.arrays import write_arrays
from attribution_core.checkpoints import save_checkpoint
from attribution_core.data.importer import import_dataset
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef, DatasetRef, FitSpec
from attribution_core.methods.fit import fit
from attribution_core.progress import NoProgress
from attribution_core.spec import DatasetSpec
from attribution_core.training.trainer import Run, Trainer
from attribution_core.unlearning.pipeline import UnlearnPipeline
from attribution_core.unlearning.spec import UnlearnSpec
from benchmarks.throughput import trainer_of
from benchmarks.workloads import WORKLOADS

METHODS: dict[str, dict[str, Any]] = {
    "newton": {"type": "newton"},
    "newton, damping 1": {"type": "newton", "damping": 1.0},
    "newton, line search": {"type": "newton", "line_search": True},
    "newton, curvature of all": {"type": "newton", "curvature": "all"},
    "datamodel matching": {"type": "datamodel_matching"},
    "datamodel matching, newton": {"type": "datamodel_matching", "estimator": "newton"},
    "datamodel matching, half the predicted change": {"type": "datamodel_matching", "scale": 0.5},
    "gradient ascent, rate 0.01": {"type": "gradient_ascent"},
    "gradient ascent, rate 0.1": {"type": "gradient_ascent", "learning_rate": 0.1},
    "fine-tuning, rate 0.01": {"type": "fine_tune"},
    "fine-tuning, rate 0.05": {"type": "fine_tune", "learning_rate": 0.05},
}
_DIGIT = 4
_SETS = ("forget", "retain", "test")


def forget_sets(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the rows of both forget sets."""
    digit = np.flatnonzero(data["train_targets"] == _DIGIT)
    images = data["train_inputs"][digit]
    axis = np.linalg.svd(images - images.mean(0), full_matrices=False)[2][0]
    axis *= np.sign(axis[np.abs(axis).argmax()])
    order = np.argsort((images - images.mean(0)) @ axis)
    random = np.random.default_rng(2).permutation(len(data["train_targets"]))[:50]
    return {"subgroup": np.sort(digit[order[len(digit) // 2 :]]), "random": np.sort(random)}


def indexed(trainer: Trainer, folder: Path, seeds: int, method: str) -> FitSpec:
    """Train on everything with some seeds, and fit an index to all of them."""
    everything = np.ones(len(trainer.data), bool)
    stacked = trainer.train([Run(everything, seed) for seed in range(seeds)]).parameters
    references = []
    for number in range(seeds):
        path = folder / f"{number}.safetensors"
        save_checkpoint(trainer.network.loaded({name: value[number] for name, value in stacked.items()}), path)
        references.append(CheckpointRef(id=str(number), path=path, sha256=sha256_file(path)))
    spec = FitSpec(
        architecture=trainer.spec.architecture,
        task=trainer.spec.task,
        dataset=trainer.spec.dataset,
        checkpoints=references,
        method={"type": method},  # type: ignore[arg-type]
        measurement="margin",
    )
    fit(spec, folder / "work", folder / "index", NoProgress())
    return spec


def test_set(data: dict[str, np.ndarray], folder: Path) -> DatasetRef:
    """Import the queries as a data set."""
    source = folder / "test.npz"
    np.savez(source, input=data["query_inputs"], target=data["query_targets"])
    spec = DatasetSpec(name="test", kind="tensor", shape=list(data["query_inputs"].shape[1:]))
    (folder / "test").mkdir()
    summary = import_dataset(source, spec, folder / "test", NoProgress())
    count = len(data["query_targets"])
    return DatasetRef(id="test", folder=folder / "test", spec=spec, sha256=summary.sha256, num_examples=count)


def run(spec: UnlearnSpec, folder: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Unlearn and compare; return the comparison and the seconds of every stage's shards."""
    pipeline, seconds = UnlearnPipeline(spec, folder), {}
    files: list[Path] = []
    for stage in pipeline.stages():
        files = [folder / stage.name / f"{shard.ordinal:05d}.safetensors" for shard in stage.shards]
        seconds[stage.name] = []
        for shard, path in zip(stage.shards, files, strict=True):
            began = time.process_time()
            write_arrays(path, pipeline.run_shard(stage.name, shard.ordinal, NoProgress()))
            seconds[stage.name].append(time.process_time() - began)
        write_arrays(folder / f"{stage.name}.safetensors", pipeline.reduce(stage.name, files, NoProgress()))
    _, evaluation = pipeline.conclude(files, folder / "out")
    assert evaluation is not None
    return evaluation, seconds


def table(evaluation: dict[str, Any], names: list[str], seconds: list[float]) -> str:
    """Return a table in Markdown."""
    size = len(seconds) // len(names)
    each = [0.0] + [float(np.mean(seconds[number * size : (number + 1) * size])) for number in range(len(names))]
    lines = [
        "| method | KLoM forget / retain / test | margin distance forget / retain / test | accuracy gap forget / retain / test | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, result, cost in zip(["nothing", *names], evaluation["results"], each, strict=True):
        sets = [result["sets"][which] for which in _SETS]
        cells = [
            " / ".join(f"{one['klom']:.2f}" for one in sets),
            " / ".join(f"{one['distance']:.2f}" for one in sets),
            " / ".join(f"{100 * one['accuracy_gap']:+.1f}" for one in sets),
            f"{cost:.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table for each forget set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oracles", type=int, default=10)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--index", default="ekfac", help="method of the index")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    arguments = parser.parse_args()
    workload = WORKLOADS["mnist-mlp"]
    data = workload.data()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = trainer_of(workload, folder, arguments.epochs)
        began = time.process_time()
        fitted = indexed(trainer, folder, arguments.checkpoints, arguments.index)
        print(f"{arguments.checkpoints} trainings and their index: {time.process_time() - began:.0f} s", flush=True)
        held_out = test_set(data, folder)
        names = arguments.methods
        for title, rows in forget_sets(data).items():
            spec = UnlearnSpec.model_validate(
                {
                    "index": folder / "index",
                    "fit": fitted,
                    "forget": rows.tolist(),
                    "method": METHODS[names[0]],
                    "baselines": [METHODS[name] for name in names[1:]],
                    "train": trainer.spec,
                    "oracles": arguments.oracles,
                    "test": {"dataset": held_out},
                }
            )
            evaluation, seconds = run(spec, folder / title)
            print(f"\n## {title}: {len(rows)} of {len(trainer.data)}\n")
            oracle = {which: evaluation["oracles"]["sets"][which] for which in _SETS}
            accuracy = " / ".join(f"{100 * one['accuracy']:.1f}" for one in oracle.values())
            halves = " / ".join(f"{one['klom_of_halves']:.2f}" for one in oracle.values())
            print(
                f"Oracles: accuracy {accuracy}, KLoM between their halves {halves}, "
                f"{sum(seconds['oracles']) / arguments.oracles:.2f} s each.\n"
            )
            print(table(evaluation, names, seconds["unlearn"]), flush=True)


if __name__ == "__main__":
    main()
