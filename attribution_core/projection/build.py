"""From a spec to a projection."""

from collections.abc import Callable, Sequence

from attribution_core.gradients import Block
from attribution_core.method_spec import DEFAULT_DIM, ProjectionSpec
from attribution_core.projection.base import Projection
from attribution_core.projection.dense import GaussianProjection, RademacherProjection
from attribution_core.projection.factored import FactoredProjection
from attribution_core.projection.sjlt import SparseProjection

_TYPES: dict[str, Callable[[int, int], Projection]] = {
    "sjlt": SparseProjection,
    "rademacher": RademacherProjection,
    "gaussian": GaussianProjection,
}


def built(spec: ProjectionSpec, blocks: Sequence[Block]) -> Projection:
    """Return the projection a spec names, unchecked."""
    dim = spec.dim or DEFAULT_DIM
    if spec.type == "factored":
        return FactoredProjection(dim, spec.seed, blocks)
    return _TYPES[spec.type](dim, spec.seed)
