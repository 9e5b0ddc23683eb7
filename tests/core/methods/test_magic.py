"""The fit of MAGIC: its scores are the replay's, its answers those of the training it repeats, whoever ran which part."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.errors import InvalidInputError
from attribution_core.fit_spec import FitSpec
from attribution_core.methods import magic
from attribution_core.methods.dense import DenseIndex
from attribution_core.methods.fit import fit
from attribution_core.methods.magic import train_spec
from attribution_core.methods.opening import open_index
from attribution_core.progress import NoProgress
from attribution_core.training.replay import Replay
from attribution_core.training.trainer import Run, Trainer
from tests.core.methods.problems import Problem, relative_error
from tests.core.methods.test_fit import hashes, run

ROWS = [4, 9, 2, 30, 31]
RECIPE = {
    "optimizer": {"type": "sgd", "momentum": 0.9},
    "learning_rate": 0.05,
    "epochs": 6,
    "batch_size": 10,
    "weight_decay": 0.001,
}


def spec_of(given: Problem, recipe: dict[str, Any] = RECIPE, **method: Any) -> FitSpec:
    queries = {"dataset": "train", "rows": ROWS}
    asked = {"type": "magic", "queries": queries, "seed": 5, "subsets": 0, **method}
    return given.with_(checkpoints=[], recipe=recipe, queries=given.spec.dataset, method=asked)


@pytest.fixture(scope="module")
def index(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> DenseIndex:
    folder, spec = tmp_path_factory.mktemp("magic"), spec_of(problem, subsets=10, alpha=0.95)
    fit(spec, folder / "work", folder / "index", NoProgress())
    opened = open_index(folder / "index", spec)
    assert isinstance(opened, DenseIndex)
    return opened


def scores(index: DenseIndex, rows: list[int] = ROWS) -> np.ndarray:
    return index.scores(index.query(index.context.source.batch(np.array(rows)), None), np.arange(60), rescore=True)


def test_scores_are_the_derivative_in_float64(problem: Problem, index: DenseIndex) -> None:
    replay = Replay(Trainer(train_spec(index.spec), dtype=torch.float64), seed=5)
    recording = replay.record()
    queries = index.context.source.batch(np.array(ROWS)).to(torch.float64)
    _, gradients = replay.measured(recording.end.parameters, queries, "margin")
    assert relative_error(scores(index), replay.scores(recording, gradients)) < 1e-4


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_optimizers_of_several_moments_are_replayed_from_files(
    problem: Problem, tmp_path: Path, optimizer: str
) -> None:
    recipe = {**RECIPE, "optimizer": {"type": optimizer, "eps": 1e-3}, "epochs": 2}
    spec = spec_of(problem, recipe)
    fit(spec, tmp_path / "work", tmp_path / "index", NoProgress())
    opened = open_index(tmp_path / "index", spec)
    assert isinstance(opened, DenseIndex)
    replay = Replay(Trainer(train_spec(spec), dtype=torch.float64), seed=5)
    recording = replay.record()
    queries = opened.context.source.batch(np.array(ROWS)).to(torch.float64)
    _, gradients = replay.measured(recording.end.parameters, queries, "margin")
    assert relative_error(scores(opened), replay.scores(recording, gradients)) < 1e-4


def test_leaving_one_out_is_predicted_with_sign_and_scale(problem: Problem, index: DenseIndex) -> None:
    """Against masked retraining without each example of the same seed, in float64."""
    trainer = Trainer(train_spec(index.spec), dtype=torch.float64)
    runs = [Run(np.arange(60) != row, 5) for row in range(60)]
    parameters = trainer.train(runs, "mask").parameters
    replay, queries = Replay(trainer, 5), index.context.source.batch(np.array(ROWS)).to(torch.float64)
    start = replay.measured(replay.record().end.parameters, queries, "margin")[0]
    effects = torch.stack(
        [
            start - replay.measured({name: value[row] for name, value in parameters.items()}, queries, "margin")[0]
            for row in range(60)
        ],
        dim=1,
    ).detach()
    predicted = torch.from_numpy(scores(index)).double()
    slope = float((predicted * effects).sum() / effects.square().sum())
    assert np.corrcoef(predicted.flatten(), effects.flatten())[0, 1] > 0.98
    assert 0.8 < slope < 1.2


def test_outputs_are_those_of_the_training_it_repeats(problem: Problem, index: DenseIndex) -> None:
    trainer = Trainer(train_spec(index.spec))
    trained = trainer.train([Run(np.ones(60, bool), 5)], "mask").parameters
    module = trainer.network.loaded({name: value[0] for name, value in trained.items()})
    batch = index.context.source.batch(np.array(ROWS))
    expected = index.context.task.measure(batch.forward(module), batch, "margin")
    np.testing.assert_allclose([out["value"] for out in index.outputs(batch)], expected, rtol=1e-5)


def test_smoothness_is_measured(index: DenseIndex) -> None:
    found = index.coverage["replay"]
    assert (found["alpha"], found["subsets"]) == (0.95, 10)
    assert 0.5 < found["metasmoothness"] <= 1
    assert found["ceiling"] > 0.95
    assert found["lds"] == pytest.approx(found["ceiling"], abs=0.03)
    assert index.coverage["percent"] == 100


def test_same_bytes_in_any_order(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magic, "_QUERIES_AT_ONCE", 2)
    monkeypatch.setattr(magic, "_SUBSETS_AT_ONCE", 3)
    spec = spec_of(problem, subsets=7)
    summary = run(spec, tmp_path / "work", tmp_path / "one")
    assert run(spec, tmp_path / "work2", tmp_path / "two", seed=1) == summary
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert (summary.num_examples, summary.dim, summary.recall) == (60, 5, None)


def test_groups_of_queries_change_nothing(
    problem: Problem, index: DenseIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(magic, "_QUERIES_AT_ONCE", 1)
    spec = spec_of(problem)
    fit(spec, tmp_path / "work", tmp_path / "index", NoProgress())
    assert relative_error(scores(DenseIndex(tmp_path / "index", spec)), scores(index)) < 1e-5


def test_queries_that_were_not_named_are_refused(index: DenseIndex) -> None:
    with pytest.raises(InvalidInputError, match="data set train that it was fitted for, 2, 4, 9, 30-31"):
        scores(index, [4, 7])


def test_what_decides_the_training_is_in_the_fingerprint(problem: Problem) -> None:
    prints = {
        spec.fingerprint()
        for spec in (
            spec_of(problem),
            spec_of(problem, seed=6),
            spec_of(problem, queries={"dataset": "train", "rows": [1]}),
            spec_of(problem, {**RECIPE, "epochs": 7}),
        )
    }
    assert len(prints) == 4


def test_a_training_that_diverges_is_refused(problem: Problem, tmp_path: Path) -> None:
    spec = spec_of(problem, {**RECIPE, "learning_rate": 1e6, "weight_decay": 1.0})
    with pytest.raises(InvalidInputError, match="diverges"):
        fit(spec, tmp_path / "work", tmp_path / "index", NoProgress())


def test_a_recording_beyond_memory_is_refused(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(magic, "MAX_RECORDED_BYTES", 1000)
    with pytest.raises(InvalidInputError, match="replaying 36 steps"):
        fit(spec_of(problem), tmp_path / "work", tmp_path / "index", NoProgress())
