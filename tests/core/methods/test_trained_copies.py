"""Copies that are trained: by the steps that are stated, once for all who compute with them, and kept with the index."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.arrays import read_arrays
from attribution_core.checkpoints import load_model, save_checkpoint
from attribution_core.errors import NotFiniteError
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef
from attribution_core.method_spec import CopyTraining, Perturbation
from attribution_core.methods.artifact import FACTORS_FILE
from attribution_core.methods.context import FitContext
from attribution_core.methods.copies import put_weights
from attribution_core.methods.fit import FitPipeline, fit
from attribution_core.methods.fitted import of_checkpoint
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.perturbation import perturb
from attribution_core.progress import NoProgress
from attribution_core.training.copies import train_copy
from attribution_core.training.data import TrainingData
from tests.core.methods.copies import chosen, relative_error, scores
from tests.core.methods.problems import SMALL, N, Problem

TRAINING = {"epochs": 3, "batch_size": 7, "step": 0.05}
OPTIONS = {"copies": 2, "noise": 1.5, "training": TRAINING, "seed": 5}
METHODS: list[dict[str, Any]] = [
    {"type": "ekfac", "projection": SMALL},
    {"type": "gauss_newton", "projection": SMALL},
    {"type": "explicit", "curvature": "gauss_newton", "projection": SMALL},
    {"type": "grad_dot", "projection": SMALL},
    {"type": "trak", "curvature": "fisher", "projection": SMALL},
]


def written(index: LoadedIndex, into: Path) -> list[CheckpointRef]:
    """An index's members, each as a checkpoint."""
    found, fitted = list[CheckpointRef](), read_arrays(index.folder / FACTORS_FILE)
    for number, member in enumerate(index.spec.members):
        if member.copy == 0:
            found.append(member.checkpoint)
            continue
        module = load_model(index.spec.architecture, member.checkpoint.path)
        put_weights(module, of_checkpoint(fitted, number))
        path = into / f"{number}.safetensors"
        save_checkpoint(module, path)
        found.append(CheckpointRef(id=path.stem, path=path, sha256=sha256_file(path)))
    return found


def data_of(context: FitContext) -> TrainingData:
    return TrainingData(context.source, context.training_rows)


def test_steps_are_those_that_are_stated(problem: Problem) -> None:
    """Against a loop over flat lists of float64 numbers, with the sums of powers written out."""
    context = FitContext(problem.spec)
    path, data = problem.spec.checkpoints[0].path, data_of(context)
    training, seed = CopyTraining(epochs=2, batch_size=7, step=0.1), 3
    module = load_model(problem.spec.architecture, path)
    train_copy(module, context.task, data, training, seed, NoProgress())

    other = load_model(problem.spec.architecture, path).double()
    order = np.random.default_rng(seed)
    epochs = [order.permutation(N) for _ in range(2)]
    batches = [rows[start : start + 7] for rows in epochs for start in range(0, N, 7)]
    parameters = [value.requires_grad_(True) for value in other.parameters()]
    sizes = [float(value.detach().square().mean().sqrt()) for value in parameters]
    seen: list[list[torch.Tensor]] = [[] for _ in parameters]
    for step, rows in enumerate(batches):
        batch = data.batch(rows).to(torch.float64)
        loss = context.task.loss(other(batch.inputs), batch).mean()
        rate = 0.1 * (1 + math.cos(math.pi * step / len(batches))) / 2
        for value, size, past, gradient in zip(
            parameters, sizes, seen, torch.autograd.grad(loss, parameters), strict=True
        ):
            past.append(gradient)
            mean = sum(0.9**age * old for age, old in enumerate(reversed(past))) / sum(
                0.9**age for age in range(len(past))
            )
            square = sum(0.99**age * float(old.square().mean()) for age, old in enumerate(reversed(past)))
            square /= sum(0.99**age for age in range(len(past)))
            with torch.no_grad():
                value.sub_(rate * size * mean / math.sqrt(square))
    for found, expected in zip(module.parameters(), other.parameters(), strict=True):
        assert relative_error(found.detach().numpy(), expected.detach().numpy()) < 1e-4


def test_training_teaches_a_copy_what_noise_made_it_forget(problem: Problem) -> None:
    context = FitContext(problem.spec)
    reference, data = problem.spec.checkpoints[0], data_of(context)
    batch = data.batch(data.rows)

    def loss(module: torch.nn.Module) -> float:
        return float(context.task.loss(module(batch.inputs), batch).mean().detach())

    module = load_model(problem.spec.architecture, reference.path)
    perturb(module, Perturbation(noise=2.0), reference.sha256, 1)
    noisy = loss(module)
    train_copy(module, context.task, data, CopyTraining(epochs=10, batch_size=8, step=0.05), 0, NoProgress())
    assert loss(module) < 0.7 * noisy


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["type"])
def test_an_index_is_that_of_an_ensemble_of_the_trained_weights(
    ensemble: Problem, method: dict[str, Any], tmp_path: Path
) -> None:
    given = ensemble.spec.checkpoints[:2]
    index = ensemble.fit("copies", method={**method, "perturbation": OPTIONS}, checkpoints=given)
    together = ensemble.fit("together", method={**method, **chosen(index)}, checkpoints=written(index, tmp_path))
    assert relative_error(scores(index, ensemble), scores(together, ensemble)) < 1e-6
    noisy = {**method, "perturbation": {**OPTIONS, "training": None}}
    untrained = ensemble.fit("noisy", method=noisy, checkpoints=given)
    assert relative_error(scores(index, ensemble), scores(untrained, ensemble)) > 0.01


def test_an_index_opens_with_the_weights_that_it_was_fitted_with(ensemble: Problem, tmp_path: Path) -> None:
    """Not with what training again would give, which another machine rounds differently."""
    method = {"type": "ekfac", "projection": SMALL, "perturbation": OPTIONS}
    index = ensemble.fit("copies", method=method)
    again = LoadedIndex(index.folder, index.spec)
    assert np.array_equal(scores(index, ensemble), scores(again, ensemble))
    number = next(number for number, member in enumerate(again.spec.members) if member.copy)
    own = of_checkpoint(read_arrays(index.folder / FACTORS_FILE), number)
    for name, value in again.context.checkpoint(number).module.named_parameters():
        assert np.array_equal(value.detach().numpy(), own[f"weights.{name}"])


def test_each_copy_is_trained_once_by_whoever_takes_it(ensemble: Problem, tmp_path: Path) -> None:
    spec = ensemble.with_(method={"type": "ekfac", "projection": SMALL, "perturbation": OPTIONS})
    (stage, *_) = FitPipeline(spec, tmp_path).stages()
    assert stage.name == "copies"
    assert len(stage.shards) == len(spec.members)
    for shard in stage.shards:
        one, other = (FitPipeline(spec, tmp_path).run_shard("copies", shard.ordinal, NoProgress()) for _ in range(2))
        assert bool(one) == bool(spec.members[shard.ordinal].copy)
        assert all(np.array_equal(one[name], other[name]) for name in one | other)


def test_progress_counts_every_example_once_per_stage(ensemble: Problem, tmp_path: Path) -> None:
    class Counted(NoProgress):
        done = 0

        def advance(self, done: int) -> None:
            self.done += done

    spec = ensemble.with_(method={"type": "grad_dot", "projection": SMALL, "perturbation": OPTIONS})
    counted = Counted()
    fit(spec, tmp_path / "work", tmp_path / "index", counted)
    assert counted.done == N * len(spec.members) * len(spec.method.stages) == N * 9 * 2


def test_examples_that_are_left_out_are_not_trained_on(problem: Problem) -> None:
    spec = problem.with_(left_out=[0, 5, N - 1])
    context, seen = FitContext(spec), list[int]()

    class Watched(TrainingData):
        def batch(self, rows: np.ndarray) -> Any:
            seen.extend(rows)
            return super().batch(rows)

    data = Watched(context.source, context.training_rows)
    module = load_model(spec.architecture, spec.checkpoints[0].path)
    train_copy(module, context.task, data, CopyTraining(epochs=2, batch_size=5), 0, NoProgress())
    assert sorted(seen) == sorted(2 * list(set(range(N)) - {0, 5, N - 1}))


def test_training_that_diverges_is_refused(problem: Problem) -> None:
    context = FitContext(problem.spec)
    module = load_model(problem.spec.architecture, problem.spec.checkpoints[0].path)
    with torch.no_grad():
        module.hidden_0.bias.fill_(10)
        module.output.weight.fill_(3e38)
    with pytest.raises(NotFiniteError, match="smaller step") as caught:
        train_copy(module, context.task, data_of(context), CopyTraining(), 0, NoProgress())
    assert caught.value.pointer == "/method/perturbation/training/step"


def test_training_decides_the_fingerprint(problem: Problem) -> None:
    """Without it the fingerprint is what it was before there was any."""
    methods = [
        {"type": "ekfac", "perturbation": chosen}
        for chosen in ({}, {"noise": 2.0}, {"training": {}}, {"training": {"epochs": 2}}, {"training": {"step": 0.1}})
    ]
    assert len({problem.with_(method=method).fingerprint() for method in methods}) == len(methods)
    named = {"copies": 9, "noise": 0.5, "seed": 0}
    plain = problem.with_(method={"type": "ekfac", "perturbation": named}).fingerprint()
    assert plain == problem.with_(method=methods[0]).fingerprint()


def test_trained_copies_have_more_noise_unless_it_is_named() -> None:
    assert Perturbation().noise == 0.5
    assert Perturbation(training=CopyTraining()).noise == 2.0
    assert Perturbation(training=CopyTraining(), noise=0.5).noise == 0.5
    for made in (Perturbation(), Perturbation(training=CopyTraining())):
        assert Perturbation.model_validate(made.model_dump()) == made


def test_vectors_of_copies_that_are_trained_have_no_noise(problem: Problem) -> None:
    reference = problem.spec.checkpoints[0]
    before = load_model(problem.spec.architecture, reference.path)
    module = load_model(problem.spec.architecture, reference.path)
    perturb(module, Perturbation(training=CopyTraining()), reference.sha256, 1)
    for old, new in zip(before.parameters(), module.parameters(), strict=True):
        assert torch.equal(old, new) == (old.ndim < 2)
