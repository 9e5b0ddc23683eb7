"""Drift: how far factors that an extension keeps are from what the rows added since say.

Both are looked at as second moments along the kept eigenvectors: `Λ` of the fit, and `Λ'` of the new rows. Drift is `‖Λ' - Λ‖ / ‖Λ‖`, the
relative Frobenius distance there, 0 if new rows are like the old. With few new rows `Λ'` is noisy and a plain distance would be large for
no reason, so the new rows are cut into two halves that do not share their noise and `‖Λ' - Λ‖²` is estimated as `⟨Λ'₁ - Λ, Λ'₂ - Λ⟩`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Moments = Mapping[str, np.ndarray]


def drift_of(members: Sequence[tuple[Moments, Moments, Moments]], layers: Mapping[str, str]) -> dict[str, Any]:
    """Return `{"value", "layers"}`: drift over all moments, and over those of each layer; the mean over checkpoints.

    Args:
        members: per checkpoint the kept means by name, and the same of each half of the new rows.
        layers: the layer that a name belongs to, for names that belong to one.
    """
    names = sorted({name for kept, _, _ in members for name in kept})
    groups = {layer: [name for name in names if layers.get(name) == layer] for layer in sorted(set(layers.values()))}
    return {
        "value": _mean_distance(members, names),
        "layers": {layer: _mean_distance(members, part) for layer, part in groups.items()},
    }


def _mean_distance(members: Sequence[tuple[Moments, Moments, Moments]], names: Sequence[str]) -> float:
    return round(float(np.mean([_distance(*member, names) for member in members])), 6)


def _distance(kept: Moments, first: Moments, second: Moments, names: Sequence[str]) -> float:
    squared, size = 0.0, 0.0
    for name in names:
        old = kept[name].astype(np.float64)
        squared += float(((first[name] - old) * (second[name] - old)).sum())
        size += float(np.square(old).sum())
    return float(np.sqrt(max(squared, 0.0) / size)) if size else 0.0
