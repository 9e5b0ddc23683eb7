"""The backward replay against finite differences of the weights in float64, for everything a step can be made of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attribution_core.data.batch import Batch
from attribution_core.training.replay import Replay, metasmoothness
from attribution_core.training.trainer import Trainer
from tests.core.training.problems import N, difference, everything, spec_of

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"optimizer": {"type": "sgd"}},
    "momentum": {"optimizer": {"type": "sgd", "momentum": 0.9}, "weight_decay": 0.01},
    "nesterov, clipped": {"gradient_clip": 0.3, "schedule": {"type": "cosine"}},
    "adam": {"optimizer": {"type": "adam", "eps": 1e-3}, "learning_rate": 0.02, "weight_decay": 0.01},
    "adamw, clipped": {
        "optimizer": {"type": "adamw", "eps": 1e-3},
        "learning_rate": 0.02,
        "weight_decay": 0.1,
        "gradient_clip": 0.5,
        "schedule": {"type": "one_cycle"},
    },
}
STEP = 1e-5


def replay_of(folder: Path, kind: str = "mlp", dtype: torch.dtype = torch.float64, **recipe: Any) -> Replay:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    return Replay(Trainer(spec_of(folder, kind, **recipe), dtype=dtype), seed=3)


def queries_of(replay: Replay, count: int = 3) -> Batch:
    return replay.trainer.data.batch(np.arange(count))


def measured(replay: Replay, weights: Tensor, queries: Batch) -> Tensor:
    """The measurements after training with each row of weights, (models, queries)."""
    parameters = replay.trained(weights)
    models = [{name: value[number] for name, value in parameters.items()} for number in range(len(weights))]
    measurement = replay.trainer.network.task.default_measurement
    return torch.stack([replay.measured(model, queries, measurement)[0] for model in models])


def differences(replay: Replay, queries: Batch) -> Tensor:
    """The central differences of the measurements by each weight, (queries, n)."""
    shifted = torch.eye(N, dtype=torch.float64) * STEP
    up, down = measured(replay, 1 + shifted, queries), measured(replay, 1 - shifted, queries)
    return (up - down).T / (2 * STEP)


def replayed(replay: Replay, queries: Batch) -> Tensor:
    recording = replay.record()
    measurement = replay.trainer.network.task.default_measurement
    return replay.scores(recording, replay.measured(recording.end.parameters, queries, measurement)[1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_scores_are_the_finite_differences(tmp_path: Path, recipe: str) -> None:
    replay = replay_of(tmp_path, **RECIPES[recipe])
    queries = queries_of(replay)
    expected = differences(replay, queries)
    assert float((replayed(replay, queries) - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["cnn", "lm"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    extra = {"augmentation": "shift"} if kind == "cnn" else {}
    replay = replay_of(tmp_path, kind, epochs=2, **extra)
    queries = queries_of(replay)
    expected = differences(replay, queries)
    assert float((replayed(replay, queries) - expected).abs().max() / expected.abs().max()) < 1e-4


def test_clipping_was_at_work(tmp_path: Path) -> None:
    """The recipes that clip train to something else than the same ones without."""
    for name in ("nesterov, clipped", "adamw, clipped"):
        ends = [
            replay_of(tmp_path / f"{name} {clip}", **{**RECIPES[name], "gradient_clip": clip}).record().end.parameters
            for clip in (RECIPES[name]["gradient_clip"], None)
        ]
        assert difference(*ends) > 0.01


def test_the_recording_is_the_training_itself(tmp_path: Path) -> None:
    replay = replay_of(tmp_path, dtype=torch.float32)
    trained = replay.trainer.train([everything(3)], "mask").parameters
    end = replay.record().end.parameters
    assert all(torch.equal(end[name], value[0]) for name, value in trained.items())


def test_a_weight_of_zero_is_a_mask(tmp_path: Path) -> None:
    replay = replay_of(tmp_path)
    run = everything(3)
    run.kept[::4] = False
    masked = replay.trainer.train([run], "mask").parameters
    assert difference(replay.trained(torch.from_numpy(run.kept).double()[None]), masked) < 1e-12


def test_one_query_at_a_time_gives_the_same(tmp_path: Path) -> None:
    """So do architectures that cannot be mapped over."""
    replay = replay_of(tmp_path)
    queries = queries_of(replay)
    together = replayed(replay, queries)
    torch.testing.assert_close(replayed(replay, queries[1:2]), together[1:2])
    replay.trainer.network.vectorises = False
    torch.testing.assert_close(replayed(replay, queries), together)


def test_memory_grows_with_the_root_of_the_steps(tmp_path: Path) -> None:
    replay = replay_of(tmp_path, epochs=20)
    assert len(replay.plan) == 100
    assert (replay.stride, len(replay.record().moments)) == (10, 10)


def test_smooth_training_keeps_its_direction() -> None:
    start = {"a": torch.zeros(3), "b": torch.zeros(1)}
    half = {"a": torch.tensor([1.0, -2.0, 0.0]), "b": torch.tensor([1.0])}
    assert metasmoothness(start, half, {name: 2 * value for name, value in half.items()}) == 1
    assert metasmoothness(start, half, start) == -1
    mixed = {"a": torch.tensor([2.0, -3.0, 5.0]), "b": torch.tensor([0.5])}
    assert metasmoothness(start, half, mixed) == pytest.approx((1 + 2 - 1) / 4)
    assert metasmoothness(start, start, start) == 1
