"""Classification by cross-entropy over (batch, classes) logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.spec import ClassificationTask
from attribution_core.tasks.base import FisherKind, Task, required_targets, sampled_labels, uniforms


class Classification(Task):
    """Integer targets."""

    measurements = ClassificationTask.measurements
    default_measurement = "margin"

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return `-log p_y`."""
        return -self._log_likelihood(output, required_targets(batch))

    def measure(self, output: Tensor, batch: Batch, measurement: str) -> Tensor:
        """Return the margin `log p_y/(1-p_y)`, log-likelihood, logit or loss of the target class."""
        targets = required_targets(batch)
        match measurement:
            case "margin":
                return self.log_odds(output, batch)
            case "log_likelihood":
                return self._log_likelihood(output, targets)
            case "logit":
                return output.gather(1, targets.unsqueeze(1)).squeeze(1)
            case "loss":
                return -self._log_likelihood(output, targets)
        raise InvalidInputError(f"classification has no measurement {measurement}", "/measurement")

    def slope(self, output: Tensor, batch: Batch, measurement: str) -> Tensor | None:
        """Return `∂ℓ/∂m`: the loss is `log(1 + e^-margin)`; a logit alone does not decide it."""
        match measurement:
            case "margin":
                return -self.residual(output, batch)
            case "log_likelihood":
                return -torch.ones_like(output[:, 0])
            case "loss":
                return torch.ones_like(output[:, 0])
        return None

    def log_odds(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the margin, as the logit minus the others' log-sum-exp: exact however confident the model is."""
        targets = required_targets(batch).unsqueeze(1)
        others = output.scatter(1, targets, -torch.inf).logsumexp(1)
        return output.gather(1, targets).squeeze(1) - others

    def residual(self, output: Tensor, batch: Batch) -> Tensor:
        """Return `1 - p_y`."""
        return torch.sigmoid(-self.log_odds(output, batch))

    def shortfall(self, output: Tensor, batch: Batch) -> Tensor | None:
        """Return `1 - p_y`."""
        return self.residual(output, batch)

    def pseudo_losses(
        self, output: Tensor, batch: Batch, kind: FisherKind, seed: int, samples: int
    ) -> Iterator[Tensor]:
        """Yield one loss per class weighted by √p, per drawn label, or the data's own."""
        log_probabilities = output.log_softmax(1)
        if kind == "empirical":
            yield self.loss(output, batch)
        elif kind == "exact":
            weights = log_probabilities.detach().exp().sqrt()
            for label in range(output.shape[1]):
                yield -weights[:, label] * log_probabilities[:, label]
        else:
            probabilities = log_probabilities.detach().exp()
            for draw in range(samples):
                labels = sampled_labels(probabilities, uniforms(seed, draw, batch.rows, 1)[:, 0])
                yield -log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1) / samples**0.5

    def directions(self, output: Tensor) -> Tensor:
        """Return the columns of a pivoted Cholesky factor of `diag(p) - p pᵀ`, (batch, classes - 1, classes).

        A confident model's first column has nearly all of the trace; eigenvectors would have little more and cost a decomposition each.
        """
        p = output.detach().double().softmax(1)
        left = p - p.square()  # the diagonal of what the columns so far do not explain
        columns = p.new_zeros(len(p), p.shape[1] - 1, p.shape[1])
        for number in range(p.shape[1] - 1):
            pivot = left.argmax(1, keepdim=True)
            explained = columns * columns.gather(2, pivot.unsqueeze(1).expand(-1, columns.shape[1], 1))
            column = (-p).scatter_add(1, pivot, torch.ones_like(p)) * p.gather(1, pivot) - explained.sum(1)
            height = left.gather(1, pivot)
            columns[:, number] = torch.where(height > 0, column / height.clamp(min=torch.finfo(p.dtype).tiny).sqrt(), 0)
            left = (left - columns[:, number].square()).clamp(min=0).scatter(1, pivot, 0)
        return columns.to(output.dtype)

    def describe(self, output: Tensor, batch: Batch, measurement: str) -> list[dict[str, Any]]:
        """Return the measurement, the most probable class and its probability."""
        values = self.measure(output, batch, measurement).tolist()
        probabilities, predictions = output.softmax(1).max(1)
        return [
            {"value": value, "prediction": prediction, "probability": probability}
            for value, prediction, probability in zip(values, predictions.tolist(), probabilities.tolist(), strict=True)
        ]

    def check(self, output: Tensor, batch: Batch) -> None:
        """Refuse anything but (batch, classes ≥ 2) logits and targets among the classes."""
        if output.dim() != 2 or output.shape[1] < 2:
            raise InvalidInputError(
                f"classification needs two or more logits per example, not shape {list(output.shape)}"
            )
        if batch.targets is not None:
            _check_classes(batch.targets, output.shape[1])

    def exact_labels(self, output: Tensor) -> int | None:
        """Return the number of classes."""
        return output.shape[1]

    @staticmethod
    def _log_likelihood(output: Tensor, targets: Tensor) -> Tensor:
        return output.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)


def _check_classes(targets: Tensor, classes: int) -> None:
    if targets.is_floating_point() or targets.dim() != 1:
        raise InvalidInputError("classification needs one integer target per example")
    outside = targets[(targets < 0) | (targets >= classes)]
    if len(outside):
        raise InvalidInputError(f"target {int(outside[0])} is not one of the model's classes 0 … {classes - 1}")
