"""Losses and measurements against their formulas, in float64, at ordinary and extreme outputs."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.spec import CausalLanguageModelingTask, ClassificationTask, RegressionTask
from attribution_core.tasks import Task, build_task

SPECS = [ClassificationTask(), RegressionTask(), CausalLanguageModelingTask(type="causal_lm")]


def classes() -> tuple[Task, Tensor, Batch]:
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 4, dtype=torch.float64)
    return build_task(ClassificationTask()), logits, Batch(torch.arange(6), logits, torch.arange(6) % 4)


def values(outputs: int | None = None) -> tuple[Task, Tensor, Batch]:
    torch.manual_seed(0)
    shape = (5,) if outputs is None else (5, outputs)
    output = torch.randn(shape, dtype=torch.float64)
    return build_task(RegressionTask()), output, Batch(torch.arange(5), output, torch.randn(shape).double())


def texts(reduction: str = "mean") -> tuple[Task, Tensor, Batch]:
    """Three texts of 7, 4 and 2 tokens, padded to 7."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    task = build_task(CausalLanguageModelingTask.model_validate({"type": "causal_lm", "reduction": reduction}))
    return task, torch.randn(3, 7, 9, dtype=torch.float64), Batch(torch.arange(3), tokens, mask=mask)


def test_classification_follows_its_formulas() -> None:
    task, logits, batch = classes()
    p = logits.softmax(1)[torch.arange(6), batch.targets]
    assert torch.allclose(task.loss(logits, batch), F.cross_entropy(logits, batch.targets, reduction="none"))
    assert torch.allclose(task.measure(logits, batch, "margin"), torch.log(p / (1 - p)))
    assert torch.allclose(task.measure(logits, batch, "log_likelihood"), torch.log(p))
    assert torch.equal(task.measure(logits, batch, "logit"), logits[torch.arange(6), batch.targets])
    assert torch.allclose(task.measure(logits, batch, "loss"), -torch.log(p))
    assert torch.allclose(task.residual(logits, batch), 1 - p)


@pytest.mark.parametrize("confidence", [-1e4, -60.0, 60.0, 1e4])
def test_a_margin_stays_exact_however_confident_the_model(confidence: float) -> None:
    task = build_task(ClassificationTask())
    logits = torch.tensor([[confidence, 0.0, 0.0]], requires_grad=True)
    margin = task.measure(logits, Batch(torch.arange(1), logits, torch.tensor([0])), "margin")
    assert margin.item() == pytest.approx(confidence - math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(margin.sum(), logits)
    assert torch.allclose(gradient, torch.tensor([[1.0, -0.5, -0.5]]))


@pytest.mark.parametrize("outputs", [None, 1, 3])
def test_regression_follows_its_formulas(outputs: int | None) -> None:
    task, output, batch = values(outputs)
    squared = (output - batch.targets).square().reshape(5, -1).sum(1)
    assert torch.allclose(task.loss(output, batch), squared / 2)
    assert torch.allclose(task.measure(output, batch, "loss"), squared / 2)
    assert torch.allclose(task.measure(output, batch, "negative_squared_error"), -squared)
    assert torch.allclose(task.measure(output, batch, "prediction"), output.reshape(5, -1).mean(1))


@pytest.mark.parametrize("outputs", [None, 1])
def test_regression_takes_targets_as_columns_or_not(outputs: int | None) -> None:
    task, output, batch = values(outputs)
    other = Batch(batch.rows, batch.inputs, batch.targets.reshape(5) if outputs else batch.targets.reshape(5, 1))
    task.check(output, other)
    assert torch.equal(task.loss(output, other), task.loss(output, batch))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_language_modelling_follows_its_formulas(reduction: str) -> None:
    task, logits, batch = texts(reduction)
    wanted = torch.stack([
        F.cross_entropy(logits[n, : length - 1], batch.inputs[n, 1:length], reduction=reduction)
        for n, length in enumerate((7, 4, 2))
    ])  # fmt: skip
    assert torch.allclose(task.loss(logits, batch), wanted)
    assert torch.allclose(task.measure(logits, batch, "loss"), wanted)
    assert torch.allclose(task.measure(logits, batch, "log_likelihood"), -wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("measurement", ["loss", "log_likelihood"])
def test_padding_has_neither_value_nor_gradient(reduction: str, measurement: str) -> None:
    task, logits, batch = texts(reduction)
    disturbed = torch.where(batch.mask.unsqueeze(-1), logits, torch.nan).requires_grad_()
    measured = task.measure(disturbed, batch, measurement)
    assert torch.allclose(measured, task.measure(logits, batch, measurement))
    clean = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(task.measure(clean, batch, measurement).sum(), clean)
    assert not gradient[~batch.mask].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_widening_a_batch_of_texts_changes_nothing(reduction: str) -> None:
    task, logits, batch = texts(reduction)
    wide, widened = F.pad(logits, (0, 0, 0, 9), value=5.0), batch.widened(16)
    for name in task.measurements:
        assert torch.allclose(task.measure(wide, widened, name), task.measure(logits, batch, name))
    assert torch.allclose(task.log_odds(wide, widened), task.log_odds(logits, batch))
    assert torch.allclose(task.residual(wide, widened), task.residual(logits, batch))
    for one, other in zip(
        task.pseudo_losses(wide, widened, "sampled", 0, 3),
        task.pseudo_losses(logits, batch, "sampled", 0, 3),
        strict=True,
    ):
        assert torch.allclose(one, other)


def test_residual_is_the_slope_of_the_loss_in_the_log_odds() -> None:
    task, logits, batch = classes()
    shift = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    moved = logits + F.one_hot(batch.targets, 4) * shift.unsqueeze(1)  # raises the log-odds of the target by `shift`
    (slope,) = torch.autograd.grad(task.loss(moved, batch).sum(), shift)
    assert torch.allclose(task.residual(logits, batch), -slope)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.type)
def test_every_listed_measurement_exists_and_no_other(spec: object) -> None:
    task, output, batch = {"classification": classes, "regression": values, "causal_lm": texts}[spec.type]()
    assert task.default_measurement in task.measurements == type(spec).measurements
    for name in task.measurements:
        assert task.measure(output, batch, name).shape == (len(batch),)
        described = task.describe(output, batch, name)
        assert [entry["value"] for entry in described] == task.measure(output, batch, name).tolist()
        assert all(entry.keys() == {"value", "prediction", "probability"} for entry in described)
    with pytest.raises(InvalidInputError) as caught:
        task.measure(output, batch, "accuracy")
    assert caught.value.pointer == "/measurement"


def test_descriptions_say_what_the_model_predicts() -> None:
    task, logits, batch = classes()
    for entry, row in zip(task.describe(logits, batch, "margin"), logits, strict=True):
        assert entry["prediction"] == int(row.argmax())
        assert entry["probability"] == pytest.approx(float(row.softmax(0).max()))


@pytest.mark.parametrize("targets", [torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])])
def test_targets_that_are_no_class_are_refused(targets: Tensor) -> None:
    with pytest.raises(InvalidInputError):
        build_task(ClassificationTask()).check(torch.zeros(2, 4), Batch(torch.arange(2), targets, targets))


@pytest.mark.parametrize(
    ("task", "output", "targets"),
    [
        (ClassificationTask(), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)),
        (ClassificationTask(), torch.zeros(2), torch.zeros(2, dtype=torch.long)),
        (RegressionTask(), torch.zeros(2, 3), torch.zeros(2)),
        (RegressionTask(), torch.zeros(2, 3, 1), torch.zeros(2, 3)),
        (CausalLanguageModelingTask(), torch.zeros(2, 5), None),
    ],
)
def test_outputs_of_the_wrong_shape_are_refused(task: object, output: Tensor, targets: Tensor | None) -> None:
    with pytest.raises(InvalidInputError):
        build_task(task).check(output, Batch(torch.arange(2), torch.zeros(2, 5, dtype=torch.long), targets))


def test_a_text_of_one_token_is_refused() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    with pytest.raises(InvalidInputError, match="fewer than two"):
        build_task(SPECS[2]).check(torch.zeros(2, 2, 5), Batch(torch.arange(2), torch.zeros(2, 2).long(), mask=mask))


@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: spec.type)
def test_a_loss_without_targets_is_refused(spec: object) -> None:
    with pytest.raises(InvalidInputError, match="needs a target"):
        build_task(spec).loss(torch.zeros(2, 3), Batch(torch.arange(2), torch.zeros(2, 3)))
