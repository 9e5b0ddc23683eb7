"""Measurements and their gradients against the library's own tasks and autodiff."""

import numpy as np
import pytest
import torch

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.exact import measure
from attribution_core.exact.measurements import CLASSIFICATION, REGRESSION, Measurement, output_slopes
from attribution_core.tasks.classification import Classification
from attribution_core.tasks.regression import Regression

CASES = [(name, "classification") for name in CLASSIFICATION] + [(name, "regression") for name in REGRESSION]


@pytest.mark.parametrize(("measurement", "kind"), CASES)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_measurements_are_those_of_the_tasks(measurement: Measurement, kind: str, width: int) -> None:
    generator = np.random.default_rng(0)
    outputs = 4 * generator.normal(size=(6, width))
    task = Classification() if kind == "classification" else Regression()
    targets = generator.integers(0, max(width, 2), 6) if kind == "classification" else generator.normal(size=(6, width))
    raw = torch.tensor(outputs, requires_grad=True)
    logits = torch.cat([torch.zeros_like(raw), raw], 1) if kind == "classification" and width == 1 else raw
    batch = Batch(torch.arange(6), torch.zeros(6, 1), torch.from_numpy(targets))
    expected = task.measure(logits, batch, measurement)
    slopes = torch.autograd.grad(expected.sum(), raw)[0] if expected.requires_grad else torch.zeros_like(raw)
    np.testing.assert_allclose(measure(outputs, targets, measurement), expected.detach(), atol=1e-12)
    np.testing.assert_allclose(output_slopes(outputs, targets, measurement), slopes, atol=1e-12)


def test_confident_outputs_stay_finite() -> None:
    outputs, targets = np.array([[900.0, -900.0], [-900.0, 900.0]]), np.array([0, 0])
    assert measure(outputs, targets, "margin").tolist() == [1800.0, -1800.0]
    assert measure(outputs, targets, "log_likelihood").tolist() == [0.0, -1800.0]


def test_a_measurement_of_the_other_kind_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no measurement 'margin'"):
        measure(np.zeros((2, 1)), np.zeros((2, 1)), "margin")
    with pytest.raises(InvalidInputError, match="no measurement 'prediction'"):
        measure(np.zeros((2, 2)), np.zeros(2, np.int64), "prediction")
