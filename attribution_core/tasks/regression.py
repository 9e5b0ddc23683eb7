"""Regression by squared error, `ℓ = ½ ‖prediction - target‖²`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.spec import RegressionTask
from attribution_core.tasks.base import FisherKind, Task, required_targets, uniforms


class Regression(Task):
    """Real targets, one or several per example; seen as a Gaussian of unit variance for the Fisher matrix."""

    measurements = RegressionTask.measurements
    default_measurement = "prediction"

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return half the squared error."""
        return (_columns(output) - _columns(required_targets(batch))).square().sum(1) / 2

    def measure(self, output: Tensor, batch: Batch, measurement: str) -> Tensor:
        """Return the prediction (mean over outputs), the negative squared error, or the loss."""
        match measurement:
            case "prediction":
                return _columns(output).mean(1)
            case "negative_squared_error":
                return -2 * self.loss(output, batch)
            case "loss":
                return self.loss(output, batch)
        raise InvalidInputError(f"regression has no measurement {measurement}", "/measurement")

    def slope(self, output: Tensor, batch: Batch, measurement: str) -> Tensor | None:
        """Return `∂ℓ/∂m`; a mean of several predictions does not decide the loss."""
        columns = _columns(output)
        match measurement:
            case "loss":
                return torch.ones_like(columns[:, 0])
            case "negative_squared_error":
                return torch.full_like(columns[:, 0], -0.5)
            case "prediction" if columns.shape[1] == 1:
                return -self.residual(output, batch)
        return None

    def log_odds(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the prediction: the natural parameter of the Gaussian."""
        return _columns(output).mean(1)

    def residual(self, output: Tensor, batch: Batch) -> Tensor:
        """Return `target - prediction`, mean over outputs."""
        return (_columns(required_targets(batch)) - _columns(output)).mean(1)

    def pseudo_losses(
        self, output: Tensor, batch: Batch, kind: FisherKind, seed: int, samples: int
    ) -> Iterator[Tensor]:
        """Yield each output itself, losses against noisy own predictions, or the data's own loss."""
        predictions = _columns(output)
        if kind == "empirical":
            yield self.loss(output, batch)
        elif kind == "exact":
            yield from predictions.unbind(1)
        else:
            for draw in range(samples):
                uniform = uniforms(seed, draw, batch.rows, predictions.shape[1]).clamp(1e-12, 1 - 1e-12)
                noise = torch.special.ndtri(uniform).to(predictions.dtype)
                yield (predictions * noise).sum(1) / samples**0.5

    def describe(self, output: Tensor, batch: Batch, measurement: str) -> list[dict[str, Any]]:
        """Return the measurement and the prediction; there is no probability."""
        values = self.measure(output, batch, measurement).tolist()
        predictions = output.tolist()
        return [
            {"value": value, "prediction": prediction, "probability": None}
            for value, prediction in zip(values, predictions, strict=True)
        ]

    def check(self, output: Tensor, batch: Batch) -> None:
        """Refuse targets of another shape than the output."""
        if output.dim() > 2:
            raise InvalidInputError(f"regression needs outputs (batch,) or (batch, d), not {list(output.shape)}")
        if batch.targets is not None and _columns(batch.targets).shape != _columns(output).shape:
            given, wanted = _columns(batch.targets).shape[1], _columns(output).shape[1]
            raise InvalidInputError(f"the target has {given} values and the model predicts {wanted}")

    def exact_labels(self, output: Tensor) -> int | None:
        """Return the number of outputs."""
        return _columns(output).shape[1]


def _columns(values: Tensor) -> Tensor:
    return values.unsqueeze(1) if values.dim() == 1 else values
