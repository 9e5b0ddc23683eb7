"""The projections' self-check: small vectors are projected under every type and compared with what they gave when the version was fixed.

Stored rows and queries meet only if both sides use one map. A machine, a library or a change that generates another one would give wrong
scores without any error, so nothing is fitted or answered there.
"""

import hashlib
from functools import cache
from typing import get_args

import numpy as np
import torch

from attribution_core.errors import ProjectionMismatchError
from attribution_core.gradients import Block
from attribution_core.method_spec import ProjectionSpec
from attribution_core.projection.build import built

_DIM = 24
_SEEDS = (0, 7 + (3 << 32))
_DIGITS = 1e6
# Changes only together with PROJECTION_VERSION.
GOLDEN = {
    "sjlt": "8c222e1930815f14ff93699c73f6a92d091848e99f9d27eb676139dd72bc8ac1",
    "rademacher": "b6e0fca2c53fb5971d6f4688a9d43a6adf39eba49284fa94351927f177117571",
    "gaussian": "f9cd0a77745af996f2a23aa08eb3fde0fce0e6fc26de45b6f05b2de3131dc429",
    "factored": "5a78b8aef067f23de3f9b499c89385b1a37b1cceebad8f98a8fb427d04d257ee",
}


@cache
def check_projections() -> None:
    """Check every type once per process.

    Raises:
        ProjectionMismatchError: naming the type that came out differently.
    """
    verify_projections()


def verify_projections() -> None:
    """Check every type.

    Raises:
        ProjectionMismatchError: naming the type that came out differently.
    """
    for kind in kinds():
        if digest(kind) != GOLDEN[kind]:
            raise ProjectionMismatchError(
                f"projections of type {kind} come out differently on this machine than where they were defined: stored features would not "
                "fit queries. Nothing is fitted or answered here; compare the versions of numpy and torch with constraints.txt"
            )


def kinds() -> tuple[str, ...]:
    """Return the types of projections that there are."""
    return get_args(ProjectionSpec.model_fields["type"].annotation)


def digest(kind: str) -> str:
    """Return a hash of a small vector's projections under two seeds, rounded to six digits: the last bits of a cosine are the machine's own."""
    blocks = [Block("small", 1, 2, 2), Block("large", 1, 9, 8), Block("groups", 2, 9, 8)]
    found = []
    for seed in _SEEDS:
        spec = ProjectionSpec(type=kind, dim=_DIM)
        parts = [
            (torch.arange(block.numel, dtype=torch.float64) % 11 - 5).view(1, block.groups, block.d_out, block.d_in)
            for block in blocks
        ]
        projected = built(spec.model_copy(update={"seed": seed}), blocks).project(parts)
        found.append(np.rint(projected.numpy() * _DIGITS).astype("<i8"))
    return hashlib.sha256(np.concatenate(found).tobytes()).hexdigest()
