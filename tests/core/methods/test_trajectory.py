"""Methods that follow a training through its checkpoints, against their formulas in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from attribution_core.errors import InvalidInputError
from attribution_core.fit_spec import CheckpointRef
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.tasks import build_task
from tests.core.methods.problems import SMALL, Problem, gradients, relative_error, training_batch

ALL = np.arange(60)
RATES = [0.5, 0.2, 0.05]


def followed(given: Problem) -> list[CheckpointRef]:
    """Two checkpoints of one training and one of another, each with a learning rate."""
    runs = zip(given.spec.checkpoints, ["a", "a", "b"], [7, 20, 10], RATES, strict=True)
    return [
        reference.model_copy(update={"run": run, "step": step, "learning_rate": rate})
        for reference, run, step, rate in runs
    ]


def both_sides(given: Problem) -> list[tuple[Tensor, Tensor]]:
    """Per checkpoint the gradients of the queries' margins and of the negative training losses."""
    task = build_task(given.spec.task)
    return [
        (gradients(module, given.queries(), task.log_odds), -gradients(module, training_batch(given), task.loss))
        for module in given.modules()
    ]


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def scores(index: LoadedIndex, given: Problem) -> np.ndarray:
    return index.scores(index.query(given.queries(), None), ALL, rescore=True)


@pytest.mark.parametrize("layout", ["vectors", "factors"])
def test_tracin_sums_over_a_training_and_averages_trainings(ensemble: Problem, layout: str) -> None:
    method = {"type": "tracin", "projection": SMALL}
    index = ensemble.fit("tracin", method=method, checkpoints=followed(ensemble), store={"layout": layout})
    parts = [rate * query @ train.T for rate, (query, train) in zip(RATES, both_sides(ensemble), strict=True)]
    expected = (parts[0] + parts[1] + parts[2]) / 2
    assert relative_error(scores(index, ensemble), expected) < (1e-5 if layout == "vectors" else 2e-3)
    own = index.scores(index.query(index.context.source.batch(ALL), None), ALL, rescore=True).diagonal()
    assert relative_error(index.self_influence(), own) < (1e-5 if layout == "vectors" else 2e-3)


def test_gas_sums_cosines(ensemble: Problem) -> None:
    index = ensemble.fit("gas", method={"type": "gas", "projection": SMALL}, checkpoints=followed(ensemble))
    parts = [
        rate * unit(query) @ unit(train).T for rate, (query, train) in zip(RATES, both_sides(ensemble), strict=True)
    ]
    assert relative_error(scores(index, ensemble), (parts[0] + parts[1] + parts[2]) / 2) < 1e-5
    own = index.scores(index.query(index.context.source.batch(ALL), None), ALL, rescore=True).diagonal()
    assert relative_error(index.self_influence(), own) < 1e-5


def test_outputs_are_those_of_the_trainings_ends(ensemble: Problem) -> None:
    method = {"type": "tracin", "projection": SMALL}
    index = ensemble.fit("ends", method=method, checkpoints=followed(ensemble), measurement="log_likelihood")
    batch = ensemble.queries()
    ends = [ensemble.modules()[number] for number in (1, 2)]
    values = torch.stack(
        [module(batch.inputs.double()).log_softmax(1).gather(1, batch.targets.unsqueeze(1))[:, 0] for module in ends]
    )
    for outputs in (index.outputs(batch), index.query(batch, None).outputs):
        np.testing.assert_allclose([entry["value"] for entry in outputs], values.mean(0).detach(), rtol=1e-5)


@pytest.mark.parametrize("method", ["tracin", "gas"])
def test_a_checkpoint_without_a_learning_rate_is_refused(ensemble: Problem, method: str) -> None:
    checkpoints = followed(ensemble)
    checkpoints[1] = checkpoints[1].model_copy(update={"learning_rate": None})
    with pytest.raises(InvalidInputError, match="needs the learning_rate of every checkpoint, and ckpt_1") as caught:
        ensemble.fit("never", method={"type": method, "projection": SMALL}, checkpoints=checkpoints)
    assert caught.value.pointer == "/checkpoints"


def test_learning_rates_are_part_of_the_fingerprint_where_they_decide(ensemble: Problem) -> None:
    other = [reference.model_copy(update={"learning_rate": 7.0}) for reference in ensemble.spec.checkpoints]
    for method, same in (("tracin", False), ("gas", False), ("grad_dot", True)):
        spec = ensemble.with_(method={"type": method})
        changed = ensemble.with_(method={"type": method}, checkpoints=other)
        assert (spec.fingerprint() == changed.fingerprint()) == same
