"""Ranks with ties, and the correlations made of them."""

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0 along the last axis of (rows, m); tied values share the mean of their ranks."""
    order = values.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    places = np.arange(values.shape[1])
    begins = np.ones(values.shape, bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ends = np.ones(values.shape, bool)
    ends[:, :-1] = begins[:, 1:]
    first = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, places, values.shape[1])[:, ::-1], axis=1)[:, ::-1]
    found = np.empty(values.shape)
    np.put_along_axis(found, order, (first + last) / 2, 1)
    return found


def pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return each pair of rows' correlation, (rows,); 0 where a row is constant, as it then orders nothing."""
    first, second = (values - values.mean(1, keepdims=True) for values in (first, second))
    scale = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    product = (first * second).sum(1)
    return np.asarray(np.divide(product, scale, out=np.zeros(len(first)), where=scale > 0))


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return each pair of rows' rank correlation, (rows,), with ties at their mean rank."""
    return pearson(ranks(first), ranks(second))


def percentiles(samples: np.ndarray, level: float) -> tuple[float, float]:
    """Return the central interval that holds a share `level` of samples."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pooled_slope(predicted: np.ndarray, realised: np.ndarray) -> float:
    """Return `Σ p̃ f̃ / Σ f̃²` of rows centred each: predicted on realised, 1 where effects have the right size, NaN where nothing was realised."""
    predicted, realised = (values - values.mean(1, keepdims=True) for values in (predicted, realised))
    total = float((realised**2).sum())
    return float((predicted * realised).sum()) / total if total > 0 else float("nan")
