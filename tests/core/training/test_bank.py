"""Banks: subsets that never change, bytes that never change, values that single models give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.data.batch import Batch
from attribution_core.data.importer import import_dataset
from attribution_core.errors import InvalidInputError
from attribution_core.progress import NoProgress
from attribution_core.training.bank import Bank, group_runs, train_group
from attribution_core.training.spec import Protocol, Semantics, TrainSpec, subset_mask
from attribution_core.training.trainer import Run, Trainer
from tests.core.training.problems import N, spec_of

PROTOCOL = Protocol(subsets=5, seeds=16)  # two subsets per group


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    folder = tmp_path_factory.mktemp("bank")
    (folder / "data").mkdir()
    return spec_of(folder, "mlp", epochs=1)


@pytest.fixture(scope="module")
def files(spec: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("groups")
    paths = [folder / f"{group}.safetensors" for group in range(3)]
    for group, path in enumerate(paths):
        write_arrays(path, train_group(Trainer(spec), PROTOCOL, group))
    return paths


def queries() -> Batch:
    generator = torch.Generator().manual_seed(3)
    return Batch(torch.full((4,), -1), torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 0]))


def changed(**fields: Any) -> Protocol:
    return Protocol.model_validate({**PROTOCOL.model_dump(), **fields})


@pytest.mark.parametrize(("alpha", "n", "kept"), [(0.5, 22, 11), (0.5, 21, 10), (0.95, 100, 95), (0.99, 100, 99)])
def test_subsets_keep_exactly_their_share(alpha: float, n: int, kept: int) -> None:
    assert all(subset_mask(changed(alpha=alpha), n, j).sum() == kept for j in range(20))


def test_subsets_are_uniform() -> None:
    masks = np.stack([subset_mask(PROTOCOL, 20, j) for j in range(2000)])
    assert np.abs(masks.mean(0) - 0.5).max() < 0.05
    assert len({mask.tobytes() for mask in masks}) > 1900


def test_a_larger_bank_begins_with_a_smaller_one(spec: TrainSpec) -> None:
    few, many = (Bank(spec, changed(subsets=count), [Path("unread")] * 9) for count in (3, 9))
    assert np.array_equal(many.masks[:3], few.masks)
    assert few.key == many.key
    for group in range(2):
        pairs = zip(*(group_runs(one.protocol, N, group, 100) for one in (few, many)), strict=True)
        assert all(np.array_equal(a.kept, b.kept) and a.seed == b.seed for a, b in pairs)


@pytest.mark.parametrize("fields", [{"alpha": 0.4}, {"seed": 1}])
def test_another_protocol_has_other_subsets(fields: dict[str, Any]) -> None:
    assert not np.array_equal(subset_mask(changed(**fields), N, 0), subset_mask(PROTOCOL, N, 0))


def test_the_key_names_all_that_decides_a_retraining(spec: TrainSpec) -> None:
    others = [changed(**field) for field in ({"alpha": 0.4}, {"seed": 1}, {"semantics": "mask"}, {"first_seed": 2})]
    recipe = {**spec.recipe.model_dump(), "learning_rate": 0.2}
    other = TrainSpec.model_validate({**spec.model_dump(), "recipe": recipe})
    keys = {PROTOCOL.bank_key(spec), PROTOCOL.bank_key(other), *(one.bank_key(spec) for one in others)}
    assert len(keys) == 6


def test_a_share_that_leaves_out_nobody_is_refused() -> None:
    with pytest.raises(InvalidInputError) as caught:
        subset_mask(changed(alpha=0.99), 20, 0)
    assert caught.value.pointer == "/alpha"


def test_groups_hold_32_models_and_fewer_large_ones() -> None:
    assert PROTOCOL.subsets_per_group(1000) == 2
    assert changed(seeds=1).subsets_per_group(1000) == 32
    assert changed(seeds=1).subsets_per_group(16 << 20) == 4
    assert changed(seeds=100).subsets_per_group(1000) == 1
    assert PROTOCOL.num_groups(1000) == 3


def test_retraining_a_group_gives_the_same_bytes(spec: TrainSpec, files: list[Path], tmp_path: Path) -> None:
    write_arrays(tmp_path / "again", train_group(Trainer(spec), PROTOCOL, 1))
    assert (tmp_path / "again").read_bytes() == files[1].read_bytes()


def test_values_are_what_single_models_measure(spec: TrainSpec, files: list[Path]) -> None:
    bank, trainer = Bank(spec, PROTOCOL, files), Trainer(spec)
    values = bank.values(queries(), "margin")
    assert values.shape == (5, 16, 4)
    assert values.dtype == np.float64
    for subset, seed in ((0, 0), (3, 7), (4, 15)):
        run = group_runs(PROTOCOL, N, subset // 2, 100)[(subset % 2) * 16 + seed]
        assert np.array_equal(run.kept, bank.masks[subset])
        parameters = {name: value[0] for name, value in trainer.train([run]).parameters.items()}
        with torch.no_grad():
            output = trainer.network.loaded(parameters)(queries().inputs)
        expected = trainer.network.task.measure(output, queries(), "margin").numpy()
        assert values[subset, seed] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_diverged_retrainings_have_no_value(spec: TrainSpec, files: list[Path], tmp_path: Path) -> None:
    arrays = read_arrays(files[0])
    arrays["diverged"][1, 4] = 1
    write_arrays(tmp_path / "0", arrays)
    bank = Bank(spec, PROTOCOL, [tmp_path / "0", *files[1:]])
    missing = np.isnan(bank.values(queries(), "margin")).all(2)
    assert np.argwhere(missing).tolist() == [[1, 4]]
    assert np.array_equal(missing, bank.diverged)


def test_a_bank_needs_all_its_groups(spec: TrainSpec, files: list[Path]) -> None:
    with pytest.raises(InvalidInputError, match="3 groups"):
        Bank(spec, PROTOCOL, files[:2])
    with pytest.raises(InvalidInputError, match="measurement"):
        Bank(spec, PROTOCOL, files).values(queries(), "prediction")


def test_examples_left_out_are_in_no_subset_and_rows_keep_their_numbers(spec: TrainSpec) -> None:
    left_out = [0, 7, 21]
    without = TrainSpec.model_validate({**spec.model_dump(), "left_out": left_out})
    masks = Bank(without, changed(subsets=9), [Path("unread")] * 9).masks
    assert masks.shape == (9, N)
    assert not masks[:, left_out].any()
    assert (masks.sum(1) == round(0.5 * (N - 3))).all()
    assert np.array_equal(
        np.delete(masks, left_out, axis=1), np.stack([subset_mask(changed(), N - 3, j) for j in range(9)])
    ), "as if they had never been there"
    assert PROTOCOL.bank_key(without) != PROTOCOL.bank_key(spec)


@pytest.mark.parametrize("semantics", ["resample", "mask"])
def test_training_without_examples_is_training_on_a_data_set_that_lacks_them(
    spec: TrainSpec, tmp_path: Path, semantics: Semantics
) -> None:
    left_out = [0, 7, 21]
    without = Trainer(TrainSpec.model_validate({**spec.model_dump(), "left_out": left_out}))
    source = np.load(spec.dataset.folder.parent / "train.npz")
    np.savez(tmp_path / "fewer.npz", **{name: np.delete(source[name], left_out, axis=0) for name in source})
    (tmp_path / "fewer").mkdir()
    summary = import_dataset(tmp_path / "fewer.npz", spec.dataset.spec, tmp_path / "fewer", NoProgress())
    fewer = {"folder": tmp_path / "fewer", "sha256": summary.sha256, "num_examples": N - 3}
    lacking = Trainer(
        TrainSpec.model_validate({**spec.model_dump(), "dataset": {**spec.dataset.model_dump(), **fewer}})
    )
    mask = subset_mask(PROTOCOL, N, 0, left_out)
    ours = without.train([Run(without.spec.everything(), 3), Run(mask, 4)], semantics)
    theirs = lacking.train([Run(np.ones(N - 3, bool), 3), Run(np.delete(mask, left_out), 4)], semantics)
    for name, value in theirs.parameters.items():
        torch.testing.assert_close(ours.parameters[name], value, rtol=0, atol=0)
    with pytest.raises(InvalidInputError, match="left out of every training"):
        without.train([Run(np.ones(N, bool), 3)], semantics)


@pytest.mark.parametrize("left_out", [[3, 1], [1, 1], [N], [-1], list(range(N))])
def test_impossible_rows_are_not_left_out(spec: TrainSpec, left_out: list[int]) -> None:
    with pytest.raises(ValueError, match=r"left_out|left out"):
        TrainSpec.model_validate({**spec.model_dump(), "left_out": left_out})
