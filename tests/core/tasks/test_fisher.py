"""Pseudo-losses: the outer products of their gradients are the Fisher matrix of each example's output."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.spec import CausalLanguageModelingTask, ClassificationTask, RegressionTask
from attribution_core.tasks import FisherKind, Task, build_task
from attribution_core.tasks.base import sampled_labels, uniforms


def fisher(task: Task, output: Tensor, batch: Batch, kind: FisherKind, samples: int = 1, seed: int = 0) -> Tensor:
    """Return Σ g gᵀ over the pseudo-losses, (batch, outputs, outputs), g being the gradient by the output."""
    output = output.clone().requires_grad_()
    size = output[0].numel()
    total = torch.zeros(len(output), size, size, dtype=output.dtype)
    for loss in task.pseudo_losses(output, batch, kind, seed, samples):
        assert loss.shape == (len(output),)
        (gradient,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
        flat = gradient.reshape(len(output), size)
        total += flat.unsqueeze(2) * flat.unsqueeze(1)
    return total


def classes(rows: Tensor) -> tuple[Task, Tensor, Batch, Tensor]:
    """Return the analytic Fisher diag(p) - p pᵀ last."""
    logits = torch.randn(len(rows), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = logits.softmax(1)
    batch = Batch(rows, logits, rows % 4)
    return build_task(ClassificationTask()), logits, batch, p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_exact_classification_is_the_analytic_fisher(scale: float) -> None:
    task, logits, batch, _ = classes(torch.arange(5))
    p = (scale * logits).softmax(1)
    wanted = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    assert torch.allclose(fisher(task, scale * logits, batch, "exact"), wanted, atol=1e-12)
    assert task.exact_labels(logits) == 4


@pytest.mark.parametrize("classes", [2, 3, 10, 32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 1000.0])
def test_directions_are_a_factor_of_the_analytic_fisher(classes: int, scale: float) -> None:
    task = build_task(ClassificationTask())
    logits = scale * torch.randn(20, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = logits.softmax(1)
    wanted = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    directions = task.directions(logits)
    assert directions is not None
    assert directions.shape == (20, classes - 1, classes)
    torch.testing.assert_close(directions.mT @ directions, wanted, rtol=0, atol=1e-12)
    first = directions[:, 0].square().sum(1)
    assert bool((first <= torch.linalg.eigvalsh(wanted)[:, -1] + 1e-12).all())
    assert bool((first >= directions.square().sum(2).max(1).values / 2).all())  # the long ones come first, about


def test_exact_fisher_of_parameters_is_the_gauss_newton_matrix() -> None:
    """Through a model: Σ g gᵀ by the weights of a linear model equals x xᵀ ⊗ (diag(p) - p pᵀ)."""
    task = build_task(ClassificationTask())
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(1, 2, dtype=torch.float64)
    output = inputs @ weight.T
    total = torch.zeros(6, 6, dtype=torch.float64)
    for loss in task.pseudo_losses(output, Batch(torch.arange(1), inputs, torch.tensor([0])), "exact", 0, 1):
        (gradient,) = torch.autograd.grad(loss.sum(), weight, retain_graph=True)
        total += gradient.reshape(-1, 1) @ gradient.reshape(1, -1)
    p = output.detach().softmax(1)[0]
    assert torch.allclose(total, torch.kron(p.diag() - p.outer(p), inputs.T @ inputs), atol=1e-12)


@pytest.mark.parametrize("outputs", [None, 1, 3])
def test_exact_regression_is_the_identity(outputs: int | None) -> None:
    task = build_task(RegressionTask())
    output = torch.randn((4,) if outputs is None else (4, outputs), dtype=torch.float64)
    found = fisher(task, output, Batch(torch.arange(4), output, output), "exact")
    assert torch.allclose(found, torch.eye(outputs or 1, dtype=torch.float64).expand_as(found))


def test_sampled_classification_converges_to_the_fisher() -> None:
    task, logits, batch, wanted = classes(torch.arange(3))
    few, many = (fisher(task, logits, batch, "sampled", samples) for samples in (40, 4000))
    assert (many - wanted).abs().max() < 0.03
    assert (many - wanted).norm() < (few - wanted).norm() / 3


def test_sampled_regression_converges_to_the_identity() -> None:
    task = build_task(RegressionTask())
    output = torch.randn(3, 2, dtype=torch.float64)
    found = fisher(task, output, Batch(torch.arange(3), output, output), "sampled", 4000)
    assert torch.allclose(found, torch.eye(2, dtype=torch.float64).expand_as(found), atol=0.12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sampled_language_modelling_converges_to_the_fisher(reduction: str) -> None:
    """Tokens are independent given the logits: the Fisher is one block diag(p) - p pᵀ per predicting position."""
    task = build_task(CausalLanguageModelingTask.model_validate({"type": "causal_lm", "reduction": reduction}))
    logits = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([4, 3])
    batch = Batch(torch.arange(2), torch.zeros(2, 4).long(), mask=torch.arange(4) < lengths.unsqueeze(1))
    found = fisher(task, logits, batch, "sampled", 4000)
    for n, length in enumerate(lengths.tolist()):
        blocks = [p.diag() - p.outer(p) for p in logits[n, : length - 1].softmax(-1)]
        padding = torch.zeros(3 * (5 - length), 3 * (5 - length), dtype=torch.float64)
        wanted = torch.block_diag(*blocks, padding) / (length - 1 if reduction == "mean" else 1)
        assert torch.allclose(found[n], wanted, atol=0.03)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_empirical_takes_the_targets_of_the_data(kind: str) -> None:
    if kind == "classification":
        task, output, batch, _ = classes(torch.arange(5))
        gradient = output.softmax(1) - F.one_hot(batch.targets, 4)
    else:
        task, output = build_task(RegressionTask()), torch.randn(5, 2, dtype=torch.float64)
        batch = Batch(torch.arange(5), output, torch.zeros(5, 2, dtype=torch.float64))
        gradient = output
    wanted = gradient.unsqueeze(2) * gradient.unsqueeze(1)
    assert torch.allclose(fisher(task, output, batch, "empirical"), wanted, atol=1e-12)


def test_a_vocabulary_is_not_enumerated() -> None:
    task = build_task(CausalLanguageModelingTask())
    batch = Batch(torch.arange(1), torch.zeros(1, 3).long())
    assert task.exact_labels(torch.zeros(1, 3, 5)) is None
    with pytest.raises(InvalidInputError) as caught:
        list(task.pseudo_losses(torch.zeros(1, 3, 5), batch, "exact", 0, 1))
    assert caught.value.pointer == "/method/fisher"


@pytest.mark.parametrize("kind", ["classification", "regression", "causal_lm"])
def test_draws_depend_on_the_row_and_not_on_its_batch(kind: str) -> None:
    rows = torch.tensor([7, 3, 1_000_000, 0])
    output = torch.randn(4, 6, 5) if kind == "causal_lm" else torch.randn(4, 5)
    inputs = torch.zeros(4, 6).long() if kind == "causal_lm" else output
    spec = {"classification": ClassificationTask, "regression": RegressionTask, "causal_lm": CausalLanguageModelingTask}
    task = build_task(spec[kind]())
    whole = Batch(rows, inputs, torch.zeros(4).long() if kind == "classification" else None)
    together = torch.stack(list(task.pseudo_losses(output, whole, "sampled", 5, 3)))
    for order in ([0], [3, 1], [2, 0, 3, 1]):
        chosen = torch.tensor(order)
        apart = torch.stack(list(task.pseudo_losses(output[chosen], whole[chosen], "sampled", 5, 3)))
        assert torch.allclose(apart, together[:, chosen], rtol=1e-6)


def test_draws_differ_by_row_seed_draw_and_position() -> None:
    rows = torch.arange(200)
    base = uniforms(0, 0, rows, 5)
    assert base.unique().numel() == 1000
    assert not torch.equal(base, uniforms(1, 0, rows, 5))
    assert not torch.equal(base, uniforms(0, 1, rows, 5))
    assert torch.equal(base[:, :3], uniforms(0, 0, rows, 3))  # a longer padding does not move the draws before it


def test_draws_are_uniform_and_uncorrelated() -> None:
    drawn = uniforms(3, 0, torch.arange(20_000), 2)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, 20, 0, 1)
    assert ((counts - 2000).abs() < 5 * 2000**0.5).all()
    neighbours = torch.stack([drawn[:-1, 0], drawn[1:, 0], drawn[:-1, 1]])
    assert (torch.corrcoef(neighbours) - torch.eye(3)).abs().max() < 0.03


def test_labels_are_drawn_with_their_probabilities() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    labels = sampled_labels(p.expand(20_000, 4), uniforms(0, 0, torch.arange(20_000), 1)[:, 0])
    frequencies = torch.bincount(labels, minlength=4) / 20_000
    assert frequencies[1] == 0
    assert (frequencies - p).abs().max() < 0.02


def test_the_ends_of_the_unit_interval_give_possible_labels() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.25, 0.75]])
    assert sampled_labels(p, torch.tensor([0.0, 0.0]).double()).tolist() == [1, 1]
    assert sampled_labels(p, torch.tensor([1 - 2**-53] * 2, dtype=torch.float64)).tolist() == [1, 2]
