"""Next-token prediction over (batch, tokens, vocabulary) logits; padding is masked."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.spec import CausalLanguageModelingTask
from attribution_core.tasks.base import FisherKind, Task, log_odds_of, sampled_labels, uniforms


class CausalLanguageModeling(Task):
    """The targets are the inputs, one position on.

    Args:
        reduction: `mean` or `sum` over an example's predicted tokens.
    """

    measurements = CausalLanguageModelingTask.measurements
    default_measurement = "log_likelihood"

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the negative log-likelihood of each example's tokens after the first."""
        return -self._reduced(self._token_log_likelihood(output, batch), batch)

    def measure(self, output: Tensor, batch: Batch, measurement: str) -> Tensor:
        """Return the log-likelihood or the loss."""
        if measurement not in self.measurements:
            raise InvalidInputError(f"language modelling has no measurement {measurement}", "/measurement")
        loss = self.loss(output, batch)
        return loss if measurement == "loss" else -loss

    def slope(self, output: Tensor, batch: Batch, measurement: str) -> Tensor | None:
        """Return `∂ℓ/∂m`."""
        sign = 1.0 if measurement == "loss" else -1.0
        return torch.full((len(output),), sign, dtype=output.dtype, device=output.device)

    def log_odds(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean over tokens of `log p/(1-p)`."""
        odds = log_odds_of(self._token_log_likelihood(output, batch))
        return self._mean(odds, batch)

    def residual(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean over tokens of `1 - p`."""
        return self._mean(-torch.expm1(self._token_log_likelihood(output, batch)), batch)

    def pseudo_losses(
        self, output: Tensor, batch: Batch, kind: FisherKind, seed: int, samples: int
    ) -> Iterator[Tensor]:
        """Yield losses against sampled next tokens, or the data's own; a vocabulary is not enumerated.

        Raises:
            InvalidInputError: for kind `exact`.
        """
        if kind == "exact":
            raise InvalidInputError(
                "the exact Fisher of a language model is not enumerated; use sampled", "/method/fisher"
            )
        if kind == "empirical":
            yield self.loss(output, batch)
            return
        log_probabilities = output[:, :-1].log_softmax(-1)
        probabilities = log_probabilities.detach().exp()
        for draw in range(samples):
            uniform = uniforms(seed, draw, batch.rows, probabilities.shape[1])
            tokens = sampled_labels(probabilities, uniform)
            likelihood = log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            yield -self._sum(likelihood, batch) / self._divisor(batch, likelihood) / samples**0.5

    def describe(self, output: Tensor, batch: Batch, measurement: str) -> list[dict[str, Any]]:
        """Return the measurement and the probability per token (geometric mean)."""
        values = self.measure(output, batch, measurement).tolist()
        per_token = self._mean(self._token_log_likelihood(output, batch), batch).exp().tolist()
        return [
            {"value": value, "prediction": None, "probability": probability}
            for value, probability in zip(values, per_token, strict=True)
        ]

    def check(self, output: Tensor, batch: Batch) -> None:
        """Refuse outputs that are not logits per token, tokens outside the vocabulary and texts of one token."""
        if output.dim() != 3:
            raise InvalidInputError(f"language modelling needs logits per token, not shape {list(output.shape)}")
        lengths = torch.full_like(batch.rows, batch.inputs.shape[1]) if batch.mask is None else batch.mask.sum(1)
        if bool((lengths < 2).any()):
            raise InvalidInputError("an example of fewer than two tokens predicts nothing")

    @staticmethod
    def _token_log_likelihood(output: Tensor, batch: Batch) -> Tensor:
        """Return log p of each next token, (batch, tokens - 1)."""
        following = batch.inputs[:, 1:].unsqueeze(-1)
        return output[:, :-1].log_softmax(-1).gather(-1, following).squeeze(-1)

    def _reduced(self, per_token: Tensor, batch: Batch) -> Tensor:
        return self._mean(per_token, batch) if self.reduction == "mean" else self._sum(per_token, batch)

    def _mean(self, per_token: Tensor, batch: Batch) -> Tensor:
        return self._sum(per_token, batch) / self._count(per_token, batch)

    def _divisor(self, batch: Batch, per_token: Tensor) -> Tensor:
        """Tokens are drawn independently, so the outer product of a sum of T pseudo-gradients is T times that of a mean loss."""
        count = self._count(per_token, batch)
        return count.sqrt() if self.reduction == "mean" else torch.ones_like(count)

    @staticmethod
    def _count(per_token: Tensor, batch: Batch) -> Tensor:
        if batch.mask is None:
            return torch.full_like(per_token[:, 0], per_token.shape[1])
        return batch.mask[:, 1:].sum(1).to(per_token.dtype)

    @staticmethod
    def _sum(per_token: Tensor, batch: Batch) -> Tensor:
        if batch.mask is None:
            return per_token.sum(1)
        return torch.where(batch.mask[:, 1:], per_token, 0).sum(1)
