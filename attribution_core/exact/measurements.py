"""Measurements of a linear model's outputs: evaluated at changed parameters, or as gradients for a first-order score.

Classes are integer targets (queries,) and real targets are (queries, C); a model with one logit is seen as two classes with logits (0, o).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.exact.glm import Estimator, GeneralizedLinear
from attribution_core.exact.losses import log_softmax

Measurement = Literal["prediction", "negative_squared_error", "margin", "log_likelihood", "logit", "loss"]
REGRESSION: tuple[Measurement, ...] = ("prediction", "negative_squared_error", "loss")
CLASSIFICATION: tuple[Measurement, ...] = ("margin", "log_likelihood", "logit", "loss")


def measure(outputs: np.ndarray, targets: np.ndarray, measurement: Measurement) -> np.ndarray:
    """Return the measurement (…, queries) of outputs (…, queries, C).

    Raises:
        InvalidInputError: if targets of this kind have no such measurement.
    """
    if not _is_classification(targets, measurement):
        if measurement == "prediction":
            return np.asarray(outputs.mean(-1))
        squared = ((outputs - targets) ** 2).sum(-1)
        return np.asarray(-squared if measurement == "negative_squared_error" else squared / 2)
    logits = _two_sided(outputs)
    if measurement == "logit":
        return _chosen(logits, targets)
    if measurement == "margin":
        return np.asarray(_chosen(logits, targets) - _log_sum_exp(_others(logits, targets)))
    likelihood = _chosen(log_softmax(logits), targets)
    return likelihood if measurement == "log_likelihood" else -likelihood


def output_slopes(outputs: np.ndarray, targets: np.ndarray, measurement: Measurement) -> np.ndarray:
    """Return the derivative (queries, C) of the measurement by the outputs (queries, C).

    Raises:
        InvalidInputError: if targets of this kind have no such measurement.
    """
    if not _is_classification(targets, measurement):
        if measurement == "prediction":
            return np.full(outputs.shape, 1 / outputs.shape[1])
        return np.asarray((outputs - targets) * (-2 if measurement == "negative_squared_error" else 1))
    logits = _two_sided(outputs)
    slopes = (np.arange(logits.shape[1]) == targets[:, None]).astype(np.float64)
    if measurement == "margin":
        slopes -= np.exp(log_softmax(_others(logits, targets)))
    elif measurement != "logit":
        slopes -= np.exp(log_softmax(logits))
    signed = -slopes if measurement == "loss" else slopes
    return np.asarray(signed[:, -outputs.shape[1] :])


def measurement_gradients(
    model: GeneralizedLinear, features: np.ndarray, targets: np.ndarray, measurement: Measurement
) -> np.ndarray:
    """Return `∇m_z` (queries, P) of queries (queries, d) at the model's parameters."""
    slopes = output_slopes(features @ model.parameters.T, targets, measurement)
    return np.asarray((slopes[:, :, None] * features[:, None, :]).reshape(len(features), -1))


def measured_changes(
    model: GeneralizedLinear,
    features: np.ndarray,
    targets: np.ndarray,
    measurement: Measurement,
    groups: Sequence[np.ndarray] | np.ndarray,
    estimator: Estimator = "alo",
) -> np.ndarray:
    """Return `m_z(θ*) - m_z(θ_{-F})` of queries for every group F, (queries, groups), with the measurement evaluated at the changed parameters.

    Args:
        model: the model at its optimum.
        features: of the queries, (queries, d).
        targets: of the queries.
        measurement: m.
        groups: row numbers of each group; an array of rows (count,) stands for single examples.
        estimator: of the parameters' change.

    Raises:
        SingularCurvatureError: if the curvature is singular, or would be without a group.
        InvalidInputError: if targets of this kind have no such measurement.
    """
    if isinstance(groups, np.ndarray):
        changes = model.parameter_changes(groups, estimator)
    else:
        changes = np.stack([model.group_change(rows, estimator) for rows in groups])
    without = model.parameters - changes.reshape(-1, *model.parameters.shape)  # (groups, C, d)
    before = measure(features @ model.parameters.T, targets, measurement)
    after = measure(features @ without.swapaxes(1, 2), targets, measurement)
    return np.asarray((before - after).T)


def _is_classification(targets: np.ndarray, measurement: Measurement) -> bool:
    classes = bool(np.issubdtype(targets.dtype, np.integer)) and targets.ndim == 1
    known = CLASSIFICATION if classes else REGRESSION
    if measurement not in known:
        raise InvalidInputError(f"there is no measurement {measurement!r} here; there are {', '.join(known)}")
    return classes


def _two_sided(outputs: np.ndarray) -> np.ndarray:
    if outputs.shape[-1] > 1:
        return outputs
    return np.concatenate([np.zeros_like(outputs), outputs], axis=-1)


def _chosen(values: np.ndarray, targets: np.ndarray) -> np.ndarray:
    chosen: np.ndarray = values[..., np.arange(len(targets)), targets]
    return chosen


def _others(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.where(np.arange(logits.shape[-1]) == targets[:, None], -np.inf, logits)


def _log_sum_exp(values: np.ndarray) -> np.ndarray:
    largest = values.max(-1, keepdims=True)
    return np.asarray(np.log(np.exp(values - largest).sum(-1)) + largest[..., 0])
