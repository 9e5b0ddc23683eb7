"""Losses as functions of a linear model's outputs `o = θ x`: values, slopes `r = ∂ℓ/∂o` and roots `L` of the curvature `∂²ℓ/∂o² = L Lᵀ`."""

from typing import Protocol

import numpy as np

from attribution_core.errors import InvalidInputError


class Loss(Protocol):
    """A convex loss; outputs are (n, C)."""

    def check(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        """Refuse targets that do not fit the outputs (InvalidInputError)."""

    def values(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return ℓ, (n,)."""

    def slopes(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return r, (n, C)."""

    def roots(self, outputs: np.ndarray) -> np.ndarray:
        """Return L, (n, C, C)."""


class SquaredError:
    """`½‖o - y‖²`, targets (n, C)."""

    def check(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        """Refuse targets of another shape."""
        if targets.shape != outputs.shape:
            raise InvalidInputError(f"targets are {list(targets.shape)} and outputs {list(outputs.shape)}")

    def values(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return half the squared errors."""
        halves: np.ndarray = ((outputs - targets) ** 2).sum(1) / 2
        return halves

    def slopes(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return the errors."""
        return np.asarray(outputs - targets)

    def roots(self, outputs: np.ndarray) -> np.ndarray:
        """Return the identity."""
        count, width = outputs.shape
        return np.broadcast_to(np.eye(width), (count, width, width))


class BinaryCrossEntropy:
    """One logit, `log(1 + e^o) - y o`, targets (n,) of 0 and 1."""

    def check(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        """Refuse anything but 0 and 1."""
        _check_labels(outputs, targets, 2)

    def values(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return `-log p_y`."""
        logits = outputs[:, 0]
        losses: np.ndarray = np.logaddexp(0, logits) - targets * logits
        return losses

    def slopes(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return `p - y`."""
        return np.asarray(_sigmoid(outputs) - targets[:, None])

    def roots(self, outputs: np.ndarray) -> np.ndarray:
        """Return `√(p(1-p))`."""
        root: np.ndarray = np.sqrt(_sigmoid(outputs) * _sigmoid(-outputs))[:, :, None]
        return root


class CrossEntropy:
    """Softmax over C logits, targets (n,) of classes."""

    def check(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        """Refuse anything but classes of the model."""
        _check_labels(outputs, targets, outputs.shape[1])

    def values(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return `-log p_y`."""
        chosen: np.ndarray = -log_softmax(outputs)[np.arange(len(targets)), targets]
        return chosen

    def slopes(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return `p - onehot(y)`."""
        slopes = np.exp(log_softmax(outputs))
        slopes[np.arange(len(targets)), targets] -= 1
        return np.asarray(slopes)

    def roots(self, outputs: np.ndarray) -> np.ndarray:
        """Return `diag(√p) - p√pᵀ`, whose square is `diag(p) - ppᵀ` because p sums to 1."""
        p = np.exp(log_softmax(outputs))
        root = np.sqrt(p)
        return np.asarray(root[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * root[:, None, :])


def log_softmax(outputs: np.ndarray) -> np.ndarray:
    """Return log-probabilities over the last axis."""
    shifted = outputs - outputs.max(-1, keepdims=True)
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    # Through logaddexp neither tail overflows.
    probabilities: np.ndarray = np.exp(-np.logaddexp(0, -logits))
    return probabilities


def _check_labels(outputs: np.ndarray, targets: np.ndarray, classes: int) -> None:
    if targets.shape != outputs.shape[:1] or not np.issubdtype(targets.dtype, np.integer):
        raise InvalidInputError("classification needs one integer target per example")
    if len(targets) and (targets.min() < 0 or targets.max() >= classes):
        raise InvalidInputError(f"targets must be classes 0 … {classes - 1}")
