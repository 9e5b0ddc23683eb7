"""Per-example parameter gradients from captured layer inputs and output gradients."""

from attribution_core.gradients.capture import Coverage, GradientCapture, Pass
from attribution_core.gradients.factors import Block, DenseGradient, LayerGradient
from attribution_core.gradients.rotation import AnyRotation, Rotation, WholeRotation, turned

__all__ = [
    "AnyRotation",
    "Block",
    "Coverage",
    "DenseGradient",
    "GradientCapture",
    "LayerGradient",
    "Pass",
    "Rotation",
    "WholeRotation",
    "turned",
]
