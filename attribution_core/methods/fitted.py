"""What a fit's arrays are called: `<checkpoint>.<name>`, and under which names an index keeps the choices of its fit."""

from collections.abc import Mapping

import numpy as np

# Where rows are whitened, at the damping that it holds.
WHITENED = "whitened"
# The damping where a query names none.
DEFAULT_DAMPING = "default_damping"
# Power and scale of residuals; indexes of before have none, and are not tempered.
TEMPERING = "tempering"
# Where stored gradients have their inputs along the axes of the curvature; indexes of before have none, and are not turned.
TURNED = "turned"
# A trained copy's parameters, as `weights.<parameter>`.
COPY_WEIGHTS = "weights"


def weights_of_copies(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays that are weights of trained copies out of all of a fit's."""
    return {name: value for name, value in arrays.items() if name.split(".", 2)[1] == COPY_WEIGHTS}


def of_checkpoint(arrays: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Return the arrays of one checkpoint out of those of all."""
    return {name.split(".", 1)[1]: value for name, value in arrays.items() if name.startswith(f"{number}.")}
