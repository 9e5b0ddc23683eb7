"""Training against torch's own optimizers, and what must not change its results: company, semantics, repetition."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attribution_core.checkpoints import save_checkpoint
from attribution_core.errors import Cancelled, FingerprintMismatchError, InvalidInputError
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef
from attribution_core.progress import NoProgress
from attribution_core.training import data as data_module
from attribution_core.training import trainer as trainer_module
from attribution_core.training.augmentation import augmented
from attribution_core.training.pipeline import TrainingPipeline
from attribution_core.training.spec import TrainSpec
from attribution_core.training.trainer import Run, Snapshot, Trainer
from tests.core.training.problems import N, by_torch, difference, everything, halves, spec_of

OPTIMIZERS: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": ({"type": "sgd"}, lambda p, d: torch.optim.SGD(p, 0.1, weight_decay=d)),
    "momentum": ({"type": "sgd", "momentum": 0.8}, lambda p, d: torch.optim.SGD(p, 0.1, 0.8, weight_decay=d)),
    "nesterov": (
        {"type": "sgd", "momentum": 0.8, "nesterov": True},
        lambda p, d: torch.optim.SGD(p, 0.1, 0.8, weight_decay=d, nesterov=True),
    ),
    "adam": ({"type": "adam"}, lambda p, d: torch.optim.Adam(p, 0.1, weight_decay=d)),
    "adamw": (
        {"type": "adamw", "betas": [0.8, 0.95], "eps": 1e-6},
        lambda p, d: torch.optim.AdamW(p, 0.1, (0.8, 0.95), 1e-6, weight_decay=d),
    ),
}


def model(parameters: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name: value[number] for name, value in parameters.items()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainSpec]:
    specs = {}
    for kind in ("mlp", "cnn", "lm"):
        folder = tmp_path_factory.mktemp(kind)
        (folder / "data").mkdir()
        specs[kind] = spec_of(folder, kind)
    return specs


def changed(spec: TrainSpec, **recipe: Any) -> TrainSpec:
    return TrainSpec.model_validate({**spec.model_dump(), "recipe": {**spec.recipe.model_dump(), **recipe}})


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_torchs(folders: dict[str, TrainSpec], name: str, decay: float, clip: float | None) -> None:
    optimizer, make = OPTIMIZERS[name]
    spec = changed(folders["mlp"], optimizer=optimizer, weight_decay=decay, gradient_clip=clip)
    trainer = Trainer(spec, dtype=torch.float64)
    run = halves(1)[0]
    module = trainer.network.loaded(trainer.initial(run)).requires_grad_(True)
    expected = by_torch(
        trainer, run, trainer.plan(run, "resample"), make(module.parameters(), decay), module, clip=clip
    )
    assert difference(model(trainer.train([run]).parameters, 0), expected) < 1e-10


@pytest.mark.parametrize("kind", ["cnn", "lm"])
def test_every_architecture_trains_with_a_schedule_as_torch_does(folders: dict[str, TrainSpec], kind: str) -> None:
    spec = changed(folders[kind], schedule={"type": "cosine"})
    trainer = Trainer(spec, dtype=torch.float64)
    run = everything(3)
    plan = trainer.plan(run, "resample")
    module = trainer.network.loaded(trainer.initial(run)).requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, 0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(plan))
    expected = by_torch(trainer, run, plan, optimizer, module, schedule)
    assert difference(model(trainer.train([run]).parameters, 0), expected) < 1e-10


def test_a_masked_run_descends_the_whole_batchs_mean_without_the_left_out(folders: dict[str, TrainSpec]) -> None:
    trainer = Trainer(folders["mlp"], dtype=torch.float64)
    run = halves(1)[0]
    module = trainer.network.loaded(trainer.initial(run)).requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, 0.9, nesterov=True)
    for step in trainer.plan(everything(run.seed), "resample"):
        batch = trainer.data.batch(step.rows)
        optimizer.zero_grad()
        losses = trainer.network.task.loss(batch.forward(module), batch)
        (losses[torch.from_numpy(run.kept[step.rows])].sum() / len(step.rows)).backward()
        optimizer.step()
    expected = {name: value.detach() for name, value in module.named_parameters()}
    assert difference(model(trainer.train([run], "mask").parameters, 0), expected) < 1e-10


@pytest.mark.parametrize("kind", ["mlp", "cnn", "lm"])
def test_with_nothing_left_out_all_semantics_are_one(folders: dict[str, TrainSpec], kind: str) -> None:
    trainer = Trainer(folders[kind])
    masked, resampled = (trainer.train([everything(5)], semantics).parameters for semantics in ("mask", "resample"))
    assert equal(masked, resampled)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "lm"])
def test_repetition_gives_the_same_bits_and_company_the_same_numbers(folders: dict[str, TrainSpec], kind: str) -> None:
    runs = halves(4)
    together = Trainer(folders[kind]).train(runs).parameters
    assert equal(Trainer(folders[kind]).train(runs).parameters, together)
    for number, run in enumerate(runs):
        alone = Trainer(folders[kind]).train([run]).parameters
        assert difference(model(alone, 0), model(together, number)) < 1e-5


def test_one_at_a_time_is_the_batched_program(folders: dict[str, TrainSpec]) -> None:
    trainer = Trainer(changed(folders["lm"], gradient_clip=0.5), dtype=torch.float64)
    runs = halves(3)
    batched = trainer.train(runs, budget=1 << 40).parameters
    assert trainer.models_at_once() > 3
    trainer.network.vectorises = False
    assert trainer.models_at_once() == 1
    assert difference(trainer.train(runs).parameters, batched) < 1e-10


def test_memory_decides_how_many_train_at_once_and_nothing_else(folders: dict[str, TrainSpec]) -> None:
    trainer = Trainer(folders["mlp"], dtype=torch.float64)
    runs = [*halves(3), everything(9), *halves(2, seed=1)]
    assert trainer.models_at_once(3 * trainer.peak_bytes()) == 3
    wide = trainer.train(runs).parameters
    narrow = trainer.train(runs, budget=2 * trainer.peak_bytes()).parameters
    assert difference(narrow, wide) < 1e-10


def test_padding_changes_nothing(folders: dict[str, TrainSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, texts are padded to the longest of all; read anew, to the longest of their batch."""
    run = halves(2)
    resident = Trainer(folders["lm"], dtype=torch.float64)
    monkeypatch.setattr(data_module, "MAX_RESIDENT_BYTES", 0)
    read = Trainer(folders["lm"], dtype=torch.float64)
    rows = np.array([0, 5])  # texts of two tokens
    assert read.data.batch(rows).inputs.shape[1] < resident.data.batch(rows).inputs.shape[1]
    assert difference(read.train(run).parameters, resident.train(run).parameters) < 1e-10


def test_seeds_decide_weights_and_order(folders: dict[str, TrainSpec]) -> None:
    trainer = Trainer(folders["mlp"])
    first, second = (trainer.plan(everything(seed), "resample") for seed in (0, 1))
    assert any(not np.array_equal(a.rows, b.rows) for a, b in zip(first, second, strict=True))
    assert not equal(trainer.initial(everything(0)), trainer.initial(everything(1)))
    for epoch in range(3):
        rows = np.concatenate([step.rows for step in first if step.epoch == epoch])
        assert sorted(rows.tolist()) == list(range(N))
    unshuffled = Trainer(changed(folders["mlp"], shuffle=False, drop_last=True)).plan(everything(0), "resample")
    assert [step.rows.tolist() for step in unshuffled[:4]] == [list(range(k, k + 5)) for k in (0, 5, 10, 15)]
    assert len(unshuffled) == 12


def test_steps_are_made_when_they_are_taken(folders: dict[str, TrainSpec]) -> None:
    """An estimate takes a few of them; a list of all would take minutes and gigabytes."""
    trainer = Trainer(changed(folders["mlp"], epochs=1_000_000, shuffle=False))
    run = everything(0)
    assert next(trainer.steps(run, "resample")).number == 0
    total = 1_000_000 * trainer.recipe.steps_per_epoch(N)
    assert trainer.num_steps(run, "resample") == total
    assert trainer.estimate_seconds([run]) > 0
    assert TrainingPipeline(trainer.spec, [0], None).stages()[0].shards[0].units == total


def test_training_draws_nothing_from_the_callers_random_numbers(folders: dict[str, TrainSpec]) -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    Trainer(folders["mlp"]).train(halves(2))
    assert torch.equal(torch.rand(3), expected)


def test_steps_can_be_differentiated(folders: dict[str, TrainSpec]) -> None:
    """Through Adam, whose root has no slope at 0, and the clip, down to the examples' weights."""
    trainer = Trainer(
        changed(folders["lm"], optimizer={"type": "adam", "eps": 1e-3}, gradient_clip=0.1, epochs=1),
        dtype=torch.float64,
    )
    run = everything(0)
    plan = trainer.plan(run, "resample")

    def final(weight: Tensor) -> Tensor:
        parameters = trainer.initial(run)
        state = trainer.optimizer.init_state(parameters)
        for step in plan:
            batch = trainer.step_batch(run, step)
            weights = torch.where(batch.rows == 3, weight, 1.0)
            gradients = torch.func.grad(trainer.network.loss)(parameters, batch, weights)
            parameters, state = trainer.advance(parameters, state, gradients, step)
        return parameters["norm.bias"].sum()

    one = torch.ones((), dtype=torch.float64)
    slope = torch.func.grad(final)(one)
    assert slope.isfinite()
    assert slope != 0
    eps = 1e-6
    assert float((final(one + eps) - final(one - eps)) / (2 * eps)) == pytest.approx(float(slope), rel=1e-4)
    assert float(final(one)) == pytest.approx(float(trainer.train([run]).parameters["norm.bias"][0].sum()), rel=1e-10)


def test_a_diverged_run_is_flagged_and_harms_no_other(folders: dict[str, TrainSpec], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    spec = spec_of(tmp_path, "mlp", learning_rate=3e4, optimizer={"type": "sgd"}, weight_decay=1.0, epochs=20)
    assert Trainer(spec).train(halves(2)).diverged.all()
    trainer = Trainer(folders["mlp"])
    runs = halves(3)
    clean = trainer.train(runs)
    begin = trainer.network.initial

    def poisoned(seed: int, checkpoint: Any = None) -> dict[str, Tensor]:
        return {name: value * (torch.nan if seed == 1 else 1) for name, value in begin(seed, checkpoint).items()}

    trainer.network.initial = poisoned  # type: ignore[method-assign]
    found = trainer.train(runs)
    assert found.diverged.tolist() == [False, True, False]
    assert not clean.diverged.any()
    assert equal(model(found.parameters, 2), model(clean.parameters, 2))


def test_snapshots_are_the_training_so_far(folders: dict[str, TrainSpec]) -> None:
    trainer = Trainer(changed(folders["mlp"], schedule={"type": "linear"}))
    seen: list[Snapshot] = []
    trained = trainer.train(halves(2), save=seen.append, save_every=4)
    plan = trainer.plan(halves(2)[0], "resample")
    assert len(plan) == 9
    assert [one.step for one in seen] == [4, 8, 9]
    assert [one.epoch for one in seen] == [2, 3, 3]
    assert [one.learning_rate for one in seen] == [plan[k].learning_rate for k in (3, 7, 8)]
    assert equal(seen[-1].parameters, trained.parameters)
    assert not equal(seen[0].parameters, seen[1].parameters)
    assert seen[0].runs == (0, 1)


class Stopping(NoProgress):
    """Counts, and cancels after some units."""

    def __init__(self, after: int = 1 << 30) -> None:
        self.done, self.after = 0, after

    def advance(self, done: int) -> None:
        self.done += done
        if self.done > self.after:
            raise Cancelled("stopped")


def test_progress_counts_models_and_steps_and_can_stop(folders: dict[str, TrainSpec]) -> None:
    trainer = Trainer(folders["mlp"])
    counted = Stopping()
    trainer.train(halves(2), progress=counted)
    assert counted.done == 2 * 9
    with pytest.raises(Cancelled):
        trainer.train(halves(2), progress=Stopping(after=5))


def test_training_goes_on_from_a_checkpoint(folders: dict[str, TrainSpec], tmp_path: Path) -> None:
    plain = Trainer(folders["mlp"])
    start = plain.network.loaded(model(plain.train([everything(7)]).parameters, 0))
    save_checkpoint(start, tmp_path / "start.safetensors")
    reference = CheckpointRef(
        id="ckpt_1", path=tmp_path / "start.safetensors", sha256=sha256_file(tmp_path / "start.safetensors")
    )
    initialisation = {"type": "checkpoint", "checkpoint": "ckpt_1"}
    dump = folders["mlp"].model_dump()
    asked = {**dump, "recipe": {**dump["recipe"], "initialisation": initialisation}}
    with pytest.raises(ValueError, match="initial must be the checkpoint"):
        TrainSpec.model_validate(asked)
    spec = TrainSpec.model_validate({**asked, "initial": reference})
    assert equal(Trainer(spec).initial(everything(1)), dict(start.named_parameters()))
    assert spec.fingerprint() != folders["mlp"].fingerprint()
    (tmp_path / "start.safetensors").write_bytes(b"other")
    with pytest.raises(FingerprintMismatchError):
        Trainer(spec)


def test_augmentation_depends_on_seed_step_and_row_alone(folders: dict[str, TrainSpec]) -> None:
    spec = changed(folders["cnn"], augmentation="shift", max_shift=1)
    trainer = Trainer(spec)
    batch = trainer.data.batch(np.arange(N))
    whole = augmented(batch, spec.recipe, seed=3, step=5)
    part = augmented(trainer.data.batch(np.array([9, 2])), spec.recipe, seed=3, step=5)
    assert torch.equal(part.inputs, whole.inputs[torch.tensor([9, 2])])
    assert not torch.equal(augmented(batch, spec.recipe, 3, 6).inputs, whole.inputs)
    assert not torch.equal(augmented(batch, spec.recipe, 4, 5).inputs, whole.inputs)
    framed = torch.nn.functional.pad(batch.inputs, (1, 1, 1, 1))
    windows = [framed[:, :, a : a + 6, b : b + 6] for a in range(3) for b in range(3)]
    used = {next(k for k, w in enumerate(windows) if torch.equal(w[i], whole.inputs[i])) for i in range(N)}
    assert len(used) > 4
    mirrored = augmented(batch, changed(spec, augmentation="horizontal_flip").recipe, 3, 5).inputs
    flips = [torch.equal(mirrored[i], batch.inputs[i].flip(-1)) for i in range(N)]
    assert 0 < sum(flips) < N
    assert all(flip or torch.equal(mirrored[i], batch.inputs[i]) for i, flip in enumerate(flips))
    together = trainer.train(halves(3)).parameters
    alone = trainer.train(halves(3)[1:2]).parameters
    assert difference(model(alone, 0), model(together, 1)) < 1e-5
    assert difference(model(alone, 0), model(Trainer(folders["cnn"]).train(halves(3)[1:2]).parameters, 0)) > 1e-3


@pytest.mark.parametrize(
    ("kind", "fields", "pointer"),
    [
        ("mlp", {"augmentation": "horizontal_flip"}, "/recipe/augmentation"),
        ("mlp", {"batch_size": 50, "drop_last": True}, "/recipe/batch_size"),
        ("mlp", {"schedule": {"type": "linear", "warmup_steps": 1000}}, "/recipe/schedule"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    folders: dict[str, TrainSpec], kind: str, fields: dict[str, Any], pointer: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Trainer(changed(folders[kind], **fields)).train([everything()])
    assert caught.value.pointer == pointer


def test_architectures_that_mix_examples_are_refused(folders: dict[str, TrainSpec]) -> None:
    architecture = {
        "name": "resnet9",
        "arguments": {"num_classes": 3, "width": 4, "input_channels": 1, "norm": "batch"},
    }
    spec = TrainSpec.model_validate({**folders["cnn"].model_dump(), "architecture": architecture})
    with pytest.raises(InvalidInputError, match="batch statistics"):
        Trainer(spec)


def test_data_that_does_not_fit_the_model_is_refused(folders: dict[str, TrainSpec]) -> None:
    two_classes = {"name": "mlp", "arguments": {"input_dim": 5, "hidden": [6], "output_dim": 2}}
    with pytest.raises(InvalidInputError):
        Trainer(TrainSpec.model_validate({**folders["mlp"].model_dump(), "architecture": two_classes}))
    with pytest.raises(InvalidInputError):
        Trainer(folders["mlp"]).train([Run(np.ones(3, bool), 0)])


def test_the_estimate_multiplies_a_step_by_all_steps(
    folders: dict[str, TrainSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(folders["mlp"])
    monkeypatch.setattr(trainer_module._Part, "seconds_per_step", lambda part, steps: 0.5 * len(part.runs))
    assert trainer.estimate_seconds(halves(4)) == pytest.approx(4 * 9 * 0.5)
    assert trainer.estimate_seconds(halves(4), "mask") == pytest.approx(4 * 15 * 0.5)
    monkeypatch.undo()
    assert trainer.estimate_seconds(halves(2)) > 0


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("impossible", [0, 4])
@pytest.mark.parametrize("kind", ["mlp", "lm"])
def test_only_examples_that_are_trained_on_must_fit_the_model(
    tmp_path: Path, kind: str, impossible: int, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "MAX_RESIDENT_BYTES", resident << 30)
    (tmp_path / "data").mkdir()
    spec = spec_of(tmp_path, kind, impossible)
    with pytest.raises(InvalidInputError, match=r"target|two tokens"):
        Trainer(spec)
    trainer = Trainer(spec.model_copy(update={"left_out": [impossible]}))
    kept = np.arange(N) != impossible
    assert not trainer.train([Run(kept, 0)]).diverged.any()
