"""Exact and classical attribution for models that are linear in their parameters, in float64; free of torch.

Changes are `θ* - θ_{-F}`: what having the examples F did to the parameters, so a measurement's gradient times a change is a score,
positive where having them raised the measurement.
"""

from attribution_core.exact.glm import Estimator, GeneralizedLinear, Regulariser
from attribution_core.exact.linear import RidgeRegression
from attribution_core.exact.logistic import LogisticRegression
from attribution_core.exact.measurements import Measurement, measure, measured_changes, measurement_gradients
from attribution_core.exact.optimum import Optimality, optimality, relative_gradient

__all__ = [
    "Estimator",
    "GeneralizedLinear",
    "LogisticRegression",
    "Measurement",
    "Optimality",
    "Regulariser",
    "RidgeRegression",
    "measure",
    "measured_changes",
    "measurement_gradients",
    "optimality",
    "relative_gradient",
]
