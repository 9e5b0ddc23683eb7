"""Gradient inner product: what one small gradient step on example i would do to the measurement.

Source: Pruthi et al. 2020 (TracIn), with one checkpoint and a learning rate of 1 on the mean loss.
"""

from attribution_core.methods.base import GradientMethod


class GradDot(GradientMethod):
    """Identity curvature."""
