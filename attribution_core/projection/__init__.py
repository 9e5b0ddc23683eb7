"""Seeded random projections that keep inner products in expectation: E⟨Px, Py⟩ = ⟨x, y⟩."""

from collections.abc import Callable

from attribution_core.projection.base import Projection
from attribution_core.projection.dense import GaussianProjection, RademacherProjection
from attribution_core.projection.sjlt import SparseProjection
from attribution_core.spec import ProjectionSpec

__all__ = ["Projection", "build_projection"]

_TYPES: dict[str, Callable[[int, int], Projection]] = {
    "sjlt": SparseProjection,
    "rademacher": RademacherProjection,
    "gaussian": GaussianProjection,
}


def build_projection(spec: ProjectionSpec) -> Projection:
    """Return the projection a spec names."""
    return _TYPES[spec.type](spec.dim, spec.seed)
