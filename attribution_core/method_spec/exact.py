"""The parameters' own change, where it has a closed form."""

from typing import ClassVar, Literal

from pydantic import Field

from attribution_core.method_spec.base import GroupEstimator, MethodBase


class ExactMethod(MethodBase):
    """Leave-one-out of linear and logistic regression: the parameters' own change, exact for squared errors."""

    architectures: ClassVar[tuple[str, ...]] = ("linear", "logistic")
    exact_rows: ClassVar[bool] = True
    reference: ClassVar[str] = "Pregibon 1981; Rad & Maleki 2020; Koh & Liang 2017"
    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive", "newton")
    type: Literal["exact"]
    estimator: Literal["alo", "influence", "newton"] = Field(
        default="alo",
        description="`alo`: one Newton step without the example, by its leverage. `influence`: without the leverage. "
        "`newton`: steps until the optimum without the example, one refit per training example.",
    )
    l2: float = Field(
        default=0.0,
        ge=0,
        le=1e12,
        description="What the model was trained with: the mean loss + l2/2 · ‖θ‖² over all parameters, bias included.",
    )
    regulariser: Literal["per_example", "fixed"] = Field(
        default="per_example",
        description="Without an example, `per_example`: the mean loss of the others with the same l2. `fixed`: the "
        "sum of their losses with the same total penalty.",
    )
    optimum: Literal["require", "polish", "assume"] = Field(
        default="require",
        description="What to do with weights that are not at the optimum: refuse them, explain the optimum that Newton "
        "steps lead to, or take them for one.",
    )
