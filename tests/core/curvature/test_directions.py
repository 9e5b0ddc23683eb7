"""Pseudo-gradients along the directions of the outputs that matter: the same Fisher matrix as that of all labels, less a known share."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from attribution_core.curvature import CovarianceSums, Eigenbasis, EigenvalueSums
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.fisher import LEFT_OUT, Fisher
from attribution_core.data.batch import Batch
from attribution_core.gradients import GradientCapture, Pass
from attribution_core.spec import CausalLanguageModelingTask, ClassificationTask, RegressionTask
from attribution_core.tasks import build_task

CLASSES, N = 5, 40
LABELS = Fisher("exact", 1, 0)


class Tokens(nn.Module):
    """Classifies sequences with padding: an embedding, a linear layer used at every token, and a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.hidden(self.embed(tokens)).tanh()
        assert mask is not None
        return self.head((hidden * mask.unsqueeze(2)).sum(1))


def _images() -> tuple[nn.Module, Batch]:
    module = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES))
    return module, Batch(torch.arange(N), torch.randn(N, 2, 3, 3), torch.arange(N) % CLASSES)


def _vectors() -> tuple[nn.Module, Batch]:
    module = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    return module, Batch(torch.arange(N), torch.randn(N, 7), torch.arange(N) % CLASSES)


def _tokens() -> tuple[nn.Module, Batch]:
    mask = torch.arange(6) < torch.randint(2, 7, (N, 1))
    return Tokens(), Batch(torch.arange(N), torch.randint(0, 9, (N, 6)), torch.arange(N) % CLASSES, mask)


CASES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {"images": _images, "vectors": _vectors, "tokens": _tokens}


class Model:
    """A model, sure of most examples, and what is drawn from it."""

    def __init__(self, name: str, sureness: float = 30.0) -> None:
        torch.manual_seed(0)
        module, batch = CASES[name]()
        module = module.double().requires_grad_(False)
        list(module.parameters())[-2].mul_(sureness)
        self.batch = batch.to(torch.float64)
        self.capture = GradientCapture(module)
        self.task = build_task(ClassificationTask())

    def run(self, batch: Batch) -> Pass:
        return self.capture.run(batch.forward, len(batch))

    def draws(self, fisher: Fisher, *cuts: int) -> list[Draws]:
        edges = [0, *cuts, N]
        parts = [self.batch[first:last] for first, last in pairwise(edges)]
        return [fisher.draws(self.run(part), self.task, part, self.run) for part in parts]

    def shortened(self) -> Fisher:
        return Fisher("auto", 1, 0).shortened(self.task, self.run(self.batch).output)

    def sums(self, draws: list[Draws]) -> dict[str, Tensor]:
        covariances = CovarianceSums(self.capture.blocks)
        for part in draws:
            covariances.add(part)
        # The basis of all labels: what is compared are the sums.
        labels = CovarianceSums(self.capture.blocks)
        for part in self.draws(LABELS):
            labels.add(part)
        eigenvalues = EigenvalueSums(Eigenbasis(self.capture.blocks, Eigenbasis.solve(labels.arrays())))
        for part in draws:
            eigenvalues.add(part)
        found = covariances.arrays() | eigenvalues.arrays()
        return {name: torch.from_numpy(value) for name, value in found.items()}


def count(draws: list[Draws]) -> int:
    return sum(len(part[0]) for batch in draws for part in batch)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cuts", [(), (1, 17)])
def test_all_directions_are_as_good_as_all_labels(name: str, cuts: tuple[int, ...]) -> None:
    model = Model(name)
    draws = model.draws(Fisher("auto", 1, 0, least=1e-300), *cuts)
    assert count(draws) == N * (CLASSES - 1)
    found, expected = model.sums(draws), model.sums(model.draws(LABELS, *cuts))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_out_is_little_and_never_added(name: str) -> None:
    model = Model(name)
    fisher, (output,) = model.shortened(), (model.run(model.batch).output.detach(),)
    draws = model.draws(fisher, 13)
    p = output.softmax(1)
    chosen = model.task.directions(output).square().sum(2)
    assert 0 < 1 - float(chosen[chosen > fisher.least].sum() / (p - p.square()).sum()) <= LEFT_OUT
    assert count(draws) < N * CLASSES / 2
    found, expected = model.sums(draws), model.sums(model.draws(LABELS))
    for key, value in expected.items():
        if key.startswith("inputs") and model.capture.blocks[int(key[-1])].inputs_fixed:
            torch.testing.assert_close(found[key], value)  # of every example, whether its outputs matter or not
        elif key.startswith("eigenvalues"):
            assert bool((found[key] <= value + 1e-12 * value.max()).all())
            assert 0 <= 1 - float(found[key].sum() / value.sum()) < 5 * LEFT_OUT


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rounding", [0, 1e-6])  # differs from batch to batch
def test_directions_of_one_length_matter_together(count: int, rounding: float) -> None:
    """Equal examples have equal directions, of which none may be taken for the 1 % that is left out."""
    torch.manual_seed(0)
    tops = torch.tensor([[6.0, 3.0], [7.0, 3.5], [6.5, 2.0]])
    outputs = torch.cat([tops, torch.full((3, 8), -6.0)], dim=1)[torch.arange(300) % count]
    outputs = outputs + rounding * torch.randn(outputs.shape)
    task = build_task(ClassificationTask())
    fisher = Fisher("auto", 1, 0).shortened(task, outputs)
    lengths = task.directions(outputs).square().sum(2)
    assert fisher.least > 0
    assert 0 < 1 - float(lengths[lengths > fisher.least].sum() / lengths.sum()) <= LEFT_OUT
    assert bool(fisher.matters(task, outputs).all())


def test_labels_are_drawn_where_no_direction_can_be_left_out() -> None:
    auto, task = Fisher("auto", 1, 0), build_task(ClassificationTask())
    alike = torch.zeros(8, CLASSES)
    assert auto.shortened(task, alike) == auto
    certain = torch.tensor([[500.0, 0.0, 0.0]]).repeat(8, 1)  # every direction has length 0
    assert auto.shortened(task, certain) == auto


def test_a_batch_in_which_nothing_matters_counts_for_its_inputs() -> None:
    model = Model("vectors")
    (draws,) = model.draws(Fisher("auto", 1, 0, least=1e300))
    assert len(draws) == 0
    found, expected = model.sums([draws]), model.sums(model.draws(LABELS))
    torch.testing.assert_close(found["inputs.0"], expected["inputs.0"])
    assert not found["eigenvalues.0"].any()
    assert not found["outputs.0"].any()


def test_labels_are_drawn_where_directions_are_no_fewer() -> None:
    unsure = Model("vectors", sureness=0.0)
    auto = Fisher("auto", 1, 0)
    assert unsure.shortened() == auto
    (draws,) = unsure.draws(auto)
    assert (len(draws), count([draws])) == (CLASSES, N * CLASSES)
    output = Model("vectors").run(Model("vectors").batch).output
    for kind in ("exact", "sampled", "empirical"):
        assert not Fisher(kind, 1, 0).chooses(unsure.task, output)
    many = torch.randn(3, 33, dtype=torch.float64)
    assert not auto.chooses(unsure.task, many)
    assert not auto.chooses(build_task(CausalLanguageModelingTask()), torch.randn(3, 4, 5))
    regression = build_task(RegressionTask())
    assert auto.shortened(regression, output) == auto


@pytest.mark.parametrize("compacted", [False, True])
def test_compact_draws_have_the_same_eigenvalues(compacted: bool) -> None:
    model = Model("images")
    (draws,) = model.draws(model.shortened())
    basis = Eigenbasis(model.capture.blocks, Eigenbasis.solve(_covariances(model, draws)))
    sums, expected = EigenvalueSums(basis), EigenvalueSums(basis)
    sums.add(draws.compact() if compacted else draws)
    for part in draws:
        for number, (gradient, rotation) in enumerate(zip(part, basis.rotations, strict=True)):
            expected.values[number] += rotation.forward(gradient.materialise()).square().sum(0)
    for found, value in zip(sums.values, expected.values, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)


def _covariances(model: Model, draws: Draws) -> dict:
    sums = CovarianceSums(model.capture.blocks)
    sums.add(draws)
    return sums.arrays()
