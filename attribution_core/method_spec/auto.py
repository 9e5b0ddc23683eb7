"""The choice of a method left to the service."""

from typing import ClassVar, Literal

from pydantic import Field

from attribution_core.method_spec.base import MethodBase


class AutoMethod(MethodBase):
    """The first of exact, explicit, gauss_newton and ekfac that fits model and size; the index says which, and why."""

    reference: ClassVar[str] = "The ladder and what it was measured on: docs/methods.md"
    type: Literal["auto"]
    l2: float = Field(
        default=0.0, ge=0, le=1e6, description="What the model was trained with: the mean loss + l2/2 · ‖θ‖²."
    )
