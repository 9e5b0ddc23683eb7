"""Seeded random projections that keep inner products in expectation: E⟨Px, Py⟩ = ⟨x, y⟩."""

from collections.abc import Sequence

from attribution_core.gradients import Block
from attribution_core.method_spec import ProjectionSpec
from attribution_core.projection.base import Projection
from attribution_core.projection.build import built
from attribution_core.projection.check import check_projections
from attribution_core.projection.factored import FactoredProjection

__all__ = ["FactoredProjection", "Projection", "build_projection", "check_projections"]


def build_projection(spec: ProjectionSpec, blocks: Sequence[Block] = ()) -> Projection:
    """Return the projection a spec names, of gradients of the given layers.

    Raises:
        ProjectionMismatchError: if this machine generates other projections than those defined.
    """
    check_projections()
    return built(spec, blocks)
