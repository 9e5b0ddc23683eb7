"""How near unlearned models are to models that never saw the forget set.

Two sets of models, both distributions because training is random: oracles, trained without the forget set, and unlearned ones. Compared
is what they output for each example, and how often and how surely they are right.

Source: Georgiev et al. 2024, Attribute-to-Delete (KLoM).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from attribution_core.data.batch import Batch
from attribution_core.tasks import Task

Arrays = dict[str, np.ndarray]
BINS = 20
MAX_MARGIN = 100.0
MIN_BINNED = 20
_EPS = 1e-5
# What two histograms without overlap come to; estimates by normal distributions are cut there too.
MAX_KLOM = float(-np.log(_EPS))
_MIN_STD = 1e-3
_BORROWED = 4


def measured(module: nn.Module, task: Task, batches: Iterable[Batch]) -> Arrays:
    """Return one model's `values` of the task's default measurement, `losses`, and for classification what is `correct`, (examples,) each."""
    found: dict[str, list[np.ndarray]] = {"values": [], "losses": []}
    with torch.no_grad():
        for batch in batches:
            output = batch.forward(module)
            found["values"].append(task.measure(output, batch, task.default_measurement).double().cpu().numpy())
            found["losses"].append(task.loss(output, batch).double().cpu().numpy())
            if task.default_measurement == "margin":
                assert batch.targets is not None
                right = output.argmax(1) == batch.targets
                found.setdefault("correct", []).append(right.double().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def klom_estimator(oracles: int, unlearned: int) -> str:
    """Return how the divergence is estimated from so many models: `binned`, or `normal` where either set is smaller than 20."""
    return "binned" if min(oracles, unlearned) >= MIN_BINNED else "normal"


def klom(oracles: np.ndarray, unlearned: np.ndarray) -> np.ndarray:
    """Return the KL divergence of margins `KL(oracles ‖ unlearned)` of every example, (examples,).

    From 20 models on in each set (Georgiev et al. take 100): histograms of 20 bins over the range of both, margins cut at ±100, every bin's
    share raised by 1e-5. From fewer: two normal distributions, `log(σ'/σ) + (σ² + (μ - μ')²) / 2σ'² - ½`, where few unlearned models borrow
    spread from the oracles, `σ'² = ((K - 1) s'² + 4 σ²) / (K + 3)`, and a single one has theirs. Both end at -log 1e-5 = 11.5.

    Args:
        oracles: (models, examples), two models at least.
        unlearned: (models, examples), one model at least.
    """
    first, second = (np.clip(values, -MAX_MARGIN, MAX_MARGIN) for values in (oracles, unlearned))
    if klom_estimator(len(first), len(second)) == "binned":
        return np.array([_binned(first[:, place], second[:, place]) for place in range(first.shape[1])])
    spread = np.maximum(first.var(0, ddof=1), _MIN_STD**2)
    free = len(second) - 1
    squares = np.maximum(((second - second.mean(0)) ** 2).sum(0), free * _MIN_STD**2)
    other = (squares + _BORROWED * spread) / (free + _BORROWED)
    distance = (first.mean(0) - second.mean(0)) ** 2
    return np.asarray(np.minimum((np.log(other / spread) + (spread + distance) / other - 1) / 2, MAX_KLOM))


def _binned(first: np.ndarray, second: np.ndarray) -> float:
    both = np.concatenate([first, second])
    edges = np.linspace(both.min(), both.max() + _EPS, BINS + 1)
    p, q = (np.histogram(values, edges)[0] / len(values) + _EPS for values in (first, second))
    p, q = p / p.sum(), q / q.sum()
    return float(np.minimum((p * np.log(p / q)).sum(), MAX_KLOM))


def compared(oracles: Mapping[str, np.ndarray], models: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return how models differ from oracles on one set of examples; both have arrays (models, examples) as `measured` names them.

    Returns:
        `klom`: mean over examples, with its `klom_median` and `klom_p95`; `distance`: mean difference of mean outputs, in units of the
        measurement; `loss`, `accuracy` and their gaps, models minus oracles (accuracy only for classification, else None).
    """
    divergences = klom(oracles["values"], models["values"])
    distance = np.abs(oracles["values"].mean(0) - models["values"].mean(0)).mean()
    found: dict[str, float | None] = {
        "klom": float(divergences.mean()),
        "klom_median": float(np.median(divergences)),
        "klom_p95": float(np.quantile(divergences, 0.95)),
        "distance": float(distance),
    }
    for name, array in (("loss", "losses"), ("accuracy", "correct")):
        own = float(models[array].mean()) if array in models else None
        found[name] = own
        found[f"{name}_gap"] = None if own is None else own - float(oracles[array].mean())
    return found


def summary(oracles: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the oracles' own mean loss and accuracy, and the KLoM between their two halves: what nothing but the seed comes to."""
    values = oracles["values"]
    halves = klom(values[::2], values[1::2]) if len(values) >= 4 else None
    return {
        "loss": float(oracles["losses"].mean()),
        "accuracy": float(oracles["correct"].mean()) if "correct" in oracles else None,
        "klom_of_halves": None if halves is None else float(halves.mean()),
    }
