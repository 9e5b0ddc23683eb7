"""How far given parameters are from the optimum that the exact methods take them for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attribution_core.exact.glm import GeneralizedLinear

# Below this a leave-one-out change is mostly the example's, whatever the training left undone.
_NEAR = 0.1
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Optimality:
    """Distances to the optimum.

    Attributes:
        gradient_norm: `‖∇‖` of the sum form of the objective.
        relative_gradient: the same as a share of `Σ ‖g_i‖`.
        newton_decrement: `√(∇ᵀ H⁻¹ ∇)`; half its square is about what the objective is above its minimum.
        in_examples: the decrement over the root mean square of `√(g_iᵀ H⁻¹ g_i)`: how many typical examples' influences away the optimum is.
    """

    gradient_norm: float
    relative_gradient: float
    newton_decrement: float
    in_examples: float

    @property
    def reached(self) -> bool:
        """Whether the optimum is near enough for single examples: a tenth of one's influence."""
        return self.in_examples <= _NEAR


def optimality(model: GeneralizedLinear) -> Optimality:
    """Measure how far a model's parameters are from the optimum of its objective.

    Raises:
        SingularCurvatureError: if the curvature is singular.
    """
    gradient = model.gradient()
    decrement = np.sqrt(max(0.0, float((gradient * model.solve(gradient, model.penalty)).sum())))
    return Optimality(
        gradient_norm=float(np.linalg.norm(gradient)),
        relative_gradient=relative_gradient(model),
        newton_decrement=float(decrement),
        in_examples=_ratio(float(decrement), float(np.sqrt(sum(_squared_influences(model)) / len(model.features)))),
    )


def relative_gradient(model: GeneralizedLinear) -> float:
    """Return `‖∇‖` of the objective as a share of `Σ ‖g_i‖`: 0 at the optimum, and told without a decomposition of the curvature."""
    norms = np.linalg.norm(model.slopes, axis=1) * np.linalg.norm(model.features, axis=1)
    return _ratio(float(np.linalg.norm(model.gradient())), float(norms.sum()))


def _squared_influences(model: GeneralizedLinear) -> Iterator[float]:
    """Yield the sum of `g_iᵀ H⁻¹ g_i` over consecutive parts of the examples."""
    for start in range(0, len(model.features), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        gradients = model.slopes[part, :, None] * model.features[part, None, :]
        yield float((gradients * model.solve(gradients, model.penalty)).sum())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float(part > 0) * np.inf
