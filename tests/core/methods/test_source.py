"""SOURCE against its formula with dense matrices, against the exactly unrolled training of a quadratic, and against retraining."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attribution_core.architectures.build import build
from attribution_core.errors import InvalidInputError
from attribution_core.fit_spec import CheckpointRef
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.spec import ArchitectureSpec
from attribution_core.tasks import build_task
from tests.core.methods.problems import (
    SMALL,
    Problem,
    gradients,
    problem,
    relative_error,
    training_batch,
)
from tests.core.methods.test_scores import ekfac_layers

ALL = np.arange(60)
N, DIM = 40, 3
LINE = ArchitectureSpec(name="linear", arguments={"input_dim": DIM, "output_dim": 1})


def followed(given: Problem, steps: Sequence[int], rates: Sequence[float], runs: Sequence[str]) -> list[CheckpointRef]:
    parts = zip(given.spec.checkpoints, steps, rates, runs, strict=True)
    return [
        reference.model_copy(update={"run": run, "step": step, "learning_rate": rate})
        for reference, step, rate, run in parts
    ]


def scores(index: LoadedIndex, batch: Any, rows: np.ndarray = ALL) -> np.ndarray:
    return index.scores(index.query(batch, None), rows, rescore=True)


def unrolled(curvature: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """`exp(-tH)` and its integral from 0 to t, `(1 - exp(-tH)) H⁻¹`, as one matrix exponential: no eigenvalue, no inverse."""
    size = len(curvature)
    eye, zero = torch.eye(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    whole = torch.linalg.matrix_exp(time * torch.cat([torch.cat([-curvature, eye], 1), torch.cat([zero, zero], 1)]))
    return whole[:size, :size], whole[:size, size:]


def dense(given: Problem, modules: list[nn.Module], times: list[tuple[list[int], float]], l2: float) -> Tensor:
    """The formula over segments (places of checkpoints, η̄ K) of one run, every matrix written out: (queries, n)."""
    task = build_task(given.spec.task)
    moved = gradients(modules[-1], given.queries(), task.log_odds)  # (queries, P)
    total = torch.zeros(len(moved), len(given.inputs), dtype=torch.float64)
    for places, time in reversed(times):
        layers = ekfac_layers([modules[place] for place in places], given.inputs)
        curvature = torch.block_diag(*(basis @ torch.diag(values) @ basis.T for basis, values in layers))
        kept, gained = unrolled(curvature + l2 * torch.eye(len(curvature), dtype=torch.float64), time)
        mean = torch.stack([-gradients(modules[place], training_batch(given), task.loss) for place in places]).mean(0)
        total += moved @ gained @ mean.T / len(given.inputs)
        moved = moved @ kept
    return total


@pytest.mark.parametrize("layout", ["vectors", "factors"])
@pytest.mark.parametrize(("momentum", "l2"), [(0.0, 0.0), (0.9, 0.02)])
def test_scores_are_the_formula(ensemble: Problem, layout: str, momentum: float, l2: float) -> None:
    checkpoints = followed(ensemble, [10, 30, 60], [0.5, 0.2, 0.1], "aaa")
    method = {"type": "source", "projection": SMALL, "segments": 2, "momentum": momentum, "l2": l2}
    index = ensemble.fit("source", method=method, checkpoints=checkpoints, store={"layout": layout})
    faster = 1 / (1 - momentum)
    times = [([0, 1], (0.5 * 10 + 0.2 * 20) * faster), ([2], 0.1 * 30 * faster)]
    expected = dense(ensemble, ensemble.modules(), times, l2)
    tolerance = 1e-4 if layout == "vectors" else 2e-3
    assert relative_error(scores(index, ensemble.queries()), expected) < tolerance
    own = scores(index, index.context.source.batch(ALL)).diagonal()
    assert relative_error(index.self_influence(), own) < tolerance


def test_runs_are_averaged_and_rates_can_cut_them(ensemble: Problem) -> None:
    checkpoints = followed(ensemble, [10, 30, 20], [0.5, 0.2, 0.1], "aab")
    method = {"type": "source", "projection": SMALL, "segments": "learning_rate"}
    index = ensemble.fit("runs", method=method, checkpoints=checkpoints)
    modules = ensemble.modules()
    one = dense(ensemble, modules[:2], [([0], 5.0), ([1], 4.0)], 0.0)
    other = dense(ensemble, modules[2:], [([0], 2.0)], 0.0)
    assert relative_error(scores(index, ensemble.queries()), (one + other) / 2) < 1e-4


def descended(inputs: Tensor, targets: Tensor, start: Tensor, rate: float, steps: int) -> tuple[list[Tensor], Tensor]:
    """Parameters (d + 1,) before every step and at the end, and the derivative of the last by every weight, (n, d + 1)."""
    a = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    path, change = [start], torch.zeros_like(a)
    for _ in range(steps):
        losses = (a @ path[-1] - targets).unsqueeze(1) * a
        change = change - rate / len(a) * (change @ (a.T @ a) + losses)
        path.append(path[-1] - rate * losses.mean(0))
    return path, change


def quadratic(folder: Path, start: Tensor, inputs: Tensor, targets: Tensor, every: int) -> tuple[Problem, Tensor]:
    """Linear regression by full-batch descent at a constant rate, a checkpoint every few steps, and the exact scores."""
    path, change = descended(inputs, targets, start, 0.01, 240)
    modules = []
    for theta in path[every::every]:
        module = build(LINE)
        layer = next(part for part in module.modules() if isinstance(part, nn.Linear))
        with torch.no_grad():
            layer.weight.copy_(theta[:-1])
            layer.bias.copy_(theta[-1:])
        modules.append(module)
    given = problem(folder, inputs, targets, LINE, task="regression", modules=modules, measurement="prediction")
    queries = given.queries().inputs.double()
    exact = torch.cat([queries, torch.ones(len(queries), 1, dtype=torch.float64)], 1) @ change.T
    steps = [every * (number + 1) for number in range(len(modules))]
    checkpoints = followed(given, steps, [0.01] * len(modules), ["a"] * len(modules))
    return Problem(folder, given.with_(checkpoints=checkpoints), given.inputs, given.targets), exact


@pytest.fixture(scope="module")
def regression_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(N, DIM, generator=generator).double()
    return inputs, inputs @ torch.randn(DIM, generator=generator).double() + torch.randn(
        N, generator=generator
    ).double()


def test_a_quadratic_at_its_optimum_is_unrolled_exactly(regression_data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """Gradients and curvature are constant there, so one segment is the whole truth but for `exp(-ηH)` in place of `1 - ηH`."""
    inputs, targets = regression_data
    a = torch.cat([inputs, torch.ones(N, 1, dtype=torch.float64)], 1)
    given, exact = quadratic(tmp_path, torch.linalg.lstsq(a, targets).solution, inputs, targets, every=120)
    index = given.fit("source", method={"type": "source", "projection": SMALL, "segments": 1})
    assert relative_error(scores(index, given.queries(), np.arange(N)), exact) < 0.01


def test_a_quadratic_is_unrolled_the_better_the_shorter_its_segments(
    regression_data: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    inputs, targets = regression_data
    errors = []
    for every in (60, 20, 8):
        given, exact = quadratic(tmp_path / str(every), torch.zeros(DIM + 1).double(), inputs, targets, every)
        method = {"type": "source", "projection": SMALL, "segments": 240 // every}
        errors.append(
            relative_error(
                scores(given.fit("source", method=method, shard_size=64), given.queries(), np.arange(N)), exact
            )
        )
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


def test_retraining_is_predicted_with_sign_and_scale(regression_data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """Against training without each example, which weighs zero in the mean; effects are larger than their slopes by the leverage."""
    inputs, targets = regression_data
    given, _ = quadratic(tmp_path, torch.zeros(DIM + 1).double(), inputs, targets, every=20)
    index = given.fit("source", method={"type": "source", "projection": SMALL, "segments": 4}, shard_size=64)
    ends = [descended(inputs, targets, torch.zeros(DIM + 1).double(), 0.01, 240)[0][-1]]
    for row in range(N):
        rest = torch.arange(N) != row
        share = (N - 1) / N
        ends.append(descended(inputs[rest], targets[rest], torch.zeros(DIM + 1).double(), 0.01 * share, 240)[0][-1])
    queries = given.queries().inputs.double()
    predictions = torch.cat([queries, torch.ones(len(queries), 1, dtype=torch.float64)], 1) @ torch.stack(ends).T
    effects = (predictions[:, :1] - predictions[:, 1:]).numpy()  # (queries, n)
    found = scores(index, given.queries(), np.arange(N)).astype(np.float64)
    assert np.corrcoef(found.ravel(), effects.ravel())[0, 1] > 0.98
    assert 0.85 < (found * effects).sum() / (effects**2).sum() < 1.1


def test_too_few_checkpoints_or_no_steps_are_refused(ensemble: Problem) -> None:
    method = {"type": "source", "projection": SMALL, "segments": 3}
    with pytest.raises(
        InvalidInputError, match="3 segments take as many checkpoints of each run, and one has 2"
    ) as few:
        ensemble.fit("never", method=method, checkpoints=followed(ensemble, [1, 2, 3], [1, 1, 1], "aab"))
    checkpoints = [reference.model_copy(update={"step": None}) for reference in ensemble.spec.checkpoints]
    with pytest.raises(InvalidInputError, match="source needs the step of every checkpoint") as none:
        ensemble.fit("never", method=method, checkpoints=checkpoints)
    assert few.value.pointer == none.value.pointer == "/checkpoints"
