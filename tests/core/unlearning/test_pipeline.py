"""The whole of it: against real retrainings, and the same bytes however the work is divided."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.errors import AttributionError, Cancelled, InvalidInputError
from attribution_core.progress import NoProgress
from attribution_core.training.trainer import Run, Trainer
from attribution_core.unlearning.evaluation import klom
from attribution_core.unlearning.pipeline import UnlearnPipeline, unlearn
from tests.core.unlearning.problems import SOURCE, Problem

ORACLES = 10
NEWTON = {"type": "newton", "line_search": True}
MATCHING = {"type": "datamodel_matching", "epochs": 30}
WILD = {"type": "datamodel_matching", "optimizer": {"type": "sgd"}, "learning_rate": 1e4}
BASELINES = [MATCHING, {"type": "gradient_ascent"}, {"type": "fine_tune"}]


def compared(problem: Problem, folder: Path) -> tuple[list[Any], dict[str, Any]]:
    spec = problem.spec(NEWTON, baselines=BASELINES, oracles=ORACLES, test={"dataset": problem.test})
    checkpoints, evaluation = unlearn(spec, folder / "work", folder / "out", NoProgress())
    assert evaluation is not None
    return checkpoints, evaluation


@pytest.fixture(scope="module")
def folder(perceptrons: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("unlearned")
    compared(perceptrons, found)
    return found


@pytest.fixture(scope="module")
def result(perceptrons: Problem, folder: Path) -> tuple[list[Any], dict[str, Any]]:
    return compared(perceptrons, folder)


def test_newton_and_matching_beat_doing_nothing_and_ascent(result: tuple[list[Any], dict[str, Any]]) -> None:
    _, evaluation = result
    nothing, newton, matching, ascent, _ = (one["sets"] for one in evaluation["results"])
    assert evaluation["oracles"]["sets"]["forget"]["accuracy"] + 0.3 < nothing["forget"]["accuracy"]
    for found in (newton, matching):
        for other in (nothing, ascent):
            assert found["forget"]["distance"] < 0.6 * other["forget"]["distance"]
            assert found["forget"]["klom"] < other["forget"]["klom"] - 1
            assert abs(found["forget"]["accuracy_gap"]) < 0.5 * abs(other["forget"]["accuracy_gap"])
            assert abs(found["forget"]["loss_gap"]) < 0.6 * abs(other["forget"]["loss_gap"])
        assert abs(found["retain"]["accuracy_gap"]) < 0.05
        assert abs(found["test"]["accuracy_gap"]) < 0.05


def test_the_comparison_is_of_retrainings_without_the_forget_set(
    perceptrons: Problem, result: tuple[list[Any], dict[str, Any]]
) -> None:
    """Every number again, from weights trained here and the files that were written."""
    assert perceptrons.train is not None
    checkpoints, evaluation = result
    trainer = Trainer(perceptrons.train)
    kept = np.ones(len(trainer.data), bool)
    kept[SOURCE] = False
    oracles = trainer.train([Run(kept, 1000 + seed) for seed in range(ORACLES)]).parameters
    states = [load_file(one.path) for one in checkpoints]
    models = {name: torch.stack([state[name] for state in states]) for name in oracles}
    batch = trainer.data.batch(SOURCE)
    margins, right = [], []
    for stacked in (oracles, models):
        outputs = trainer.network.outputs(stacked, batch)
        margins.append(np.stack([trainer.network.task.measure(one, batch, "margin").numpy() for one in outputs]))
        right.append((outputs.argmax(2) == batch.targets).double().mean().item())
    found = evaluation["results"][1]["sets"]["forget"]
    assert found["klom"] == pytest.approx(klom(*margins).mean(), rel=1e-3)
    assert found["accuracy_gap"] == pytest.approx(right[1] - right[0], abs=1e-6)
    assert evaluation["oracles"]["trained"] == ORACLES
    assert evaluation["oracles"]["diverged"] == 0
    assert evaluation["klom_estimator"] == "normal"
    assert [one.source for one in checkpoints] == ["ckpt_0", "ckpt_1", "ckpt_2"]


def test_work_that_stopped_goes_on_to_the_same_bytes(perceptrons: Problem, folder: Path, tmp_path: Path) -> None:
    """Shards in another order, each by a new worker, some of them twice."""
    spec = perceptrons.spec(NEWTON, baselines=BASELINES, oracles=ORACLES, test={"dataset": perceptrons.test})
    for stage in UnlearnPipeline(spec, tmp_path).stages():
        files = [tmp_path / stage.name / f"{shard.ordinal:05d}.safetensors" for shard in stage.shards]
        for shard in [*reversed(stage.shards), stage.shards[0]]:
            pipeline = UnlearnPipeline(spec, tmp_path)
            write_arrays(files[shard.ordinal], pipeline.run_shard(stage.name, shard.ordinal, NoProgress()))
            original = folder / "work" / stage.name / files[shard.ordinal].name
            assert files[shard.ordinal].read_bytes() == original.read_bytes()
        write_arrays(tmp_path / f"{stage.name}.safetensors", pipeline.reduce(stage.name, files, NoProgress()))
    checkpoints, evaluation = UnlearnPipeline(spec, tmp_path).conclude(files, tmp_path / "out")
    first, expected = compared(perceptrons, folder)
    assert evaluation == expected
    assert [one.path.read_bytes() for one in checkpoints] == [one.path.read_bytes() for one in first]


def test_without_a_comparison_there_are_only_checkpoints(perceptrons: Problem, tmp_path: Path) -> None:
    spec = perceptrons.spec(NEWTON, train=None)
    checkpoints, evaluation = unlearn(spec, tmp_path / "work", tmp_path / "out", NoProgress())
    assert evaluation is None
    assert len(checkpoints) == 3
    assert checkpoints[0].report["change_norm"] > 0
    before, after = load_file(perceptrons.fit.checkpoints[0].path), load_file(checkpoints[0].path)
    assert before.keys() == after.keys()
    change = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm()
    assert float(change) == pytest.approx(checkpoints[0].report["change_norm"], rel=1e-4)


def test_weights_that_are_no_numbers_are_refused(perceptrons: Problem, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="finite") as error:
        UnlearnPipeline(perceptrons.spec(WILD), tmp_path).run_shard("unlearn", 0, NoProgress())
    assert error.value.pointer == "/method"


def test_a_baseline_that_diverges_is_counted_and_left_out(perceptrons: Problem, tmp_path: Path) -> None:
    spec = perceptrons.spec(NEWTON, baselines=[WILD], oracles=2)
    _, evaluation = unlearn(spec, tmp_path / "work", tmp_path / "out", NoProgress())
    assert evaluation is not None
    nothing, newton, wild = evaluation["results"]
    assert [one["diverged"] for one in (nothing, newton, wild)] == [0, 0, 3]
    assert wild["sets"] == {}
    assert newton["sets"].keys() == {"forget", "retain"}  # no test set was given


def test_diverged_oracles_are_left_out_and_counted(perceptrons: Problem, folder: Path, tmp_path: Path) -> None:
    spec = perceptrons.spec(NEWTON, oracles=ORACLES)
    pipeline = UnlearnPipeline(spec, tmp_path)
    (tmp_path / "oracles").mkdir()
    files = sorted((folder / "work" / "oracles").iterdir())
    spoiled = []
    for path in files:
        arrays = read_arrays(path)
        arrays["diverged"] = np.ones_like(arrays["diverged"])
        arrays["diverged"][:3] = path != files[0]
        write_arrays(tmp_path / path.name, arrays)
        spoiled.append(tmp_path / path.name)
    write_arrays(tmp_path / "oracles.safetensors", pipeline.reduce("oracles", spoiled, NoProgress()))
    shards = sorted((folder / "work" / "unlearn").iterdir())[:3]
    write_arrays(tmp_path / "unlearn.safetensors", pipeline.reduce("unlearn", shards, NoProgress()))
    _, evaluation = pipeline.conclude(shards, tmp_path / "out")
    assert evaluation is not None
    assert evaluation["oracles"]["diverged"] == ORACLES - 3
    for path in spoiled:
        write_arrays(path, {**read_arrays(path), "diverged": np.ones(len(read_arrays(path)["diverged"]), np.uint8)})
    with pytest.raises(AttributionError, match="diverged"):
        pipeline.reduce("oracles", spoiled, NoProgress())


def test_work_can_be_stopped(perceptrons: Problem, tmp_path: Path) -> None:
    class Stopping:
        def advance(self, done: int) -> None:
            raise Cancelled("stop")

    pipeline = UnlearnPipeline(perceptrons.spec(NEWTON, baselines=BASELINES, oracles=ORACLES), tmp_path)
    for stage in pipeline.stages():
        for shard in stage.shards[::3]:
            with pytest.raises(Cancelled):
                pipeline.run_shard(stage.name, shard.ordinal, Stopping())
