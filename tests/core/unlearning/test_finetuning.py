"""Fine-tuning reaches what it aims at."""

from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress
from attribution_core.training.network import Network
from attribution_core.training.spec import TrainSpec
from attribution_core.training.trainer import Run, Trainer
from attribution_core.unlearning.pipeline import UnlearnPipeline
from tests.core.unlearning.problems import SOURCE, Problem, logistic

LONG = {"type": "datamodel_matching", "epochs": 200, "learning_rate": 3e-3, "retained": 0}


class Counted:
    def __init__(self) -> None:
        self.done = 0

    def advance(self, done: int) -> None:
        self.done += done


def outputs(problem: Problem, arrays: dict[str, np.ndarray] | None, rows: np.ndarray, number: int = 0) -> Any:
    """The logits of a checkpoint, with new weights or its own, and the batch."""
    pipeline = UnlearnPipeline(problem.spec({"type": "newton"}), problem.folder)
    context = pipeline.subject.context
    network = Network(problem.fit.architecture, context.task)
    parameters = network.initial(0, problem.fit.checkpoints[number])
    if arrays is not None:
        parameters = {name: torch.from_numpy(arrays[f"weights.{name}"]) for name in parameters}
    batch = context.source.batch(rows)
    return network.output(parameters, batch), batch, context.task


def matched(problem: Problem, method: dict[str, Any], number: int = 0, **chosen: Any) -> dict[str, np.ndarray]:
    return UnlearnPipeline(problem.spec(method, **chosen), problem.folder).run_shard("unlearn", number, NoProgress())


@pytest.mark.parametrize(("estimator", "scale"), [("additive", 1.0), ("newton", 1.0), ("additive", 0.25)])
def test_matched_margins_are_the_datamodels(perceptrons: Problem, estimator: str, scale: float) -> None:
    forget = np.array([3, 40, 77])
    method = {**LONG, "estimator": estimator, "scale": scale}
    found = matched(perceptrons, method, 1, forget=forget.tolist())
    before, batch, task = outputs(perceptrons, None, forget, 1)
    after, *_ = outputs(perceptrons, found, forget, 1)
    index = LoadedIndex(perceptrons.folder / "index", perceptrons.fit)
    query = index.query(batch, None)
    additive, newton = index.group_effects(query, [forget], rescore=True), index.newton_effects(query, [forget])
    effect = (newton if estimator == "newton" else additive)[:, 0]
    target = task.measure(before, batch, "margin").numpy() - scale * effect
    assert np.abs(effect).min() > 0.02
    assert np.allclose(task.measure(after, batch, "margin").numpy(), target, atol=0.01)


def test_with_logits_every_class_is_matched(tmp_path: Any) -> None:
    problem = logistic(tmp_path, measurement="logit")
    forget = np.array([3, 40])
    found = matched(problem, {**LONG, "epochs": 500, "learning_rate": 1e-2}, forget=forget.tolist())
    before, batch, _ = outputs(problem, None, forget)
    after, *_ = outputs(problem, found, forget)
    index = LoadedIndex(problem.folder / "index", problem.fit)
    for label in range(3):
        asked = type(batch)(batch.rows, batch.inputs, torch.full_like(batch.rows, label))
        effect = index.group_effects(index.query(asked, None), [forget], rescore=True)[:, 0]
        assert np.allclose(after[:, label].numpy(), before[:, label].numpy() - effect, atol=5e-3)
        assert np.abs(effect).max() > 0.02


def test_examples_that_stay_are_matched_four_to_one(perceptrons: Problem) -> None:
    (matcher,) = UnlearnPipeline(perceptrons.spec({"type": "datamodel_matching"}), perceptrons.folder).unlearners
    rows = matcher.rows  # type: ignore[attr-defined]
    assert np.isin(SOURCE, rows).all()
    assert len(rows) == 5 * len(SOURCE)
    assert np.diff(np.setdiff1d(rows, SOURCE)).max() <= 4  # spread over all of them


def test_fine_tuning_is_training_on_what_stays(perceptrons: Problem) -> None:
    recipe = {"optimizer": {"type": "sgd", "momentum": 0.9}, "learning_rate": 1e-2, "epochs": 5, "batch_size": 50}
    spec = perceptrons.spec({"type": "fine_tune", "seed": 3})
    found = UnlearnPipeline(spec, perceptrons.folder).run_shard("unlearn", 1, NoProgress())
    assert perceptrons.train is not None
    start = perceptrons.fit.checkpoints[1]
    named = {**recipe, "initialisation": {"type": "checkpoint", "checkpoint": start.id}}
    by_trainer = TrainSpec.model_validate({**perceptrons.train.model_dump(), "recipe": named, "initial": start})
    expected = Trainer(by_trainer).train([Run(spec.kept(), 3)]).parameters
    for name, value in expected.items():
        assert np.allclose(found[f"weights.{name}"], value[0].numpy(), atol=1e-6)


def test_one_step_of_ascent_goes_up_the_forget_sets_mean_loss(perceptrons: Problem) -> None:
    method = {"type": "gradient_ascent", "epochs": 1, "learning_rate": 0.1}
    found = matched(perceptrons, method)
    network = Network(perceptrons.fit.architecture, outputs(perceptrons, None, SOURCE)[2])
    start = network.initial(0, perceptrons.fit.checkpoints[0])
    _, batch, task = outputs(perceptrons, None, SOURCE)
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    task.loss(network.output(leaves, batch), batch).mean().backward()
    for name, value in leaves.items():
        assert np.allclose(found[f"weights.{name}"], (value + 0.1 * value.grad).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["newton", "datamodel_matching", "gradient_ascent", "fine_tune"])
def test_progress_comes_to_the_shards_units(perceptrons: Problem, kind: str) -> None:
    pipeline = UnlearnPipeline(perceptrons.spec({"type": kind}), perceptrons.folder)
    (stage,) = pipeline.stages()
    for shard in stage.shards[:2]:
        counted = Counted()
        pipeline.run_shard("unlearn", shard.ordinal, counted)
        assert counted.done == shard.units > 0
