"""The method `auto` stands for: the first rung of a ladder that fits model and size, and why; free of torch.

The ladder is exact, then approximate leave-one-out, then the whole curvature matrix, then EK-FAC. That the last rung is not the Gauss-Newton solve
follows measurement (docs/benchmarks.md; linear datamodeling score, one checkpoint): on the two perceptrons EK-FAC had 0.51 and 0.59 at its
default damping and the solve 0.30 and 0.29 (0.52 and 0.60 against 0.50 and 0.45 at the best), on the language model they tie.
"""

from collections.abc import Callable
from dataclasses import dataclass

from attribution_core.method_spec import (
    AutoMethod,
    EkfacMethod,
    ExactMethod,
    ExplicitMethod,
    MethodSpec,
)
from attribution_core.spec import Spec

MAX_EXACT_SIDE = 16_384
MAX_EXPLICIT_PARAMETERS = 2_000
MAX_EXPLICIT_WORK = 10_000_000
# A chain of dense layers, whose gradients are products of two vectors.
_PERCEPTRONS = ("mlp", "linear", "logistic")


@dataclass(frozen=True)
class Situation:
    """What the choice depends on.

    Attributes:
        architecture: its name; plugins and others have theirs.
        task: its type.
        num_parameters: P.
        num_examples: n.
        num_features: inputs of a linear or logistic regression, bias included; its curvature has this many rows per output.
        all_layers: whether every layer is attributed.
    """

    architecture: str
    task: str
    num_parameters: int
    num_examples: int
    num_features: int | None = None
    all_layers: bool = True


class Rung(Spec):
    """A method that was considered, and why it was taken or left."""

    method: str
    taken: bool
    reason: str


class Choice(Spec):
    """What `auto` came to: every rung down to the one taken."""

    asked: AutoMethod
    reason: str
    considered: list[Rung]


def chosen(asked: AutoMethod, situation: Situation) -> tuple[MethodSpec, Choice]:
    """Return the method for a model and its training set, and the explanation."""
    considered: list[Rung] = []
    for rung in (_exact, _explicit):
        name, method, reason = rung(asked, situation)
        considered.append(Rung(method=name, taken=method is not None, reason=reason))
        if method is not None:
            return method, Choice(asked=asked, reason=reason, considered=considered)
    reason = _ekfac_reason(situation)
    considered.append(Rung(method="ekfac", taken=True, reason=reason))
    return EkfacMethod(type="ekfac"), Choice(asked=asked, reason=reason, considered=considered)


_Rung = Callable[[AutoMethod, Situation], tuple[str, MethodSpec | None, str]]


def _exact(asked: AutoMethod, at: Situation) -> tuple[str, MethodSpec | None, str]:
    if at.architecture not in ExactMethod.architectures:
        return (
            "exact",
            None,
            f"exact attribution is for {' and '.join(ExactMethod.architectures)}, not {at.architecture}",
        )
    if not at.all_layers:
        return "exact", None, "exact attribution takes the whole model, not chosen layers"
    side = at.num_features if at.task == "regression" else at.num_parameters
    if side is None or side > MAX_EXACT_SIDE:
        return "exact", None, f"its curvature has more than {MAX_EXACT_SIDE:,} rows, too many to decompose"
    reason = (
        "leaving an example out of a linear regression has a closed form, the refit itself"
        if at.task == "regression"
        else "one Newton step with the example's leverage (ALO) is near to the refit of a convex model"
    )
    reason += "; the weights are taken for the optimum at the given l2"
    return "exact", ExactMethod(type="exact", l2=asked.l2, optimum="assume"), reason


def _explicit(asked: AutoMethod, at: Situation) -> tuple[str, MethodSpec | None, str]:
    if at.num_parameters > MAX_EXPLICIT_PARAMETERS:
        reason = f"{at.num_parameters:,} parameters are more than the {MAX_EXPLICIT_PARAMETERS:,} of a whole matrix"
        return "explicit", None, reason
    if at.num_parameters * at.num_examples > MAX_EXPLICIT_WORK:
        return "explicit", None, f"a product per parameter over {at.num_examples:,} examples takes too long"
    if at.architecture not in _PERCEPTRONS:
        return (
            "explicit",
            None,
            f"it is for chains of dense layers; {at.architecture} may hold layers without such products",
        )
    method = ExplicitMethod(type="explicit", curvature="gauss_newton", l2=asked.l2)
    return "explicit", method, f"the whole Gauss-Newton matrix of {at.num_parameters:,} parameters is small enough"


def _ekfac_reason(at: Situation) -> str:
    if at.architecture in _PERCEPTRONS:
        return (
            "on multilayer perceptrons EK-FAC predicted retraining better than Gauss-Newton solves (LDS 0.51 and 0.30), at one "
            "rotation per query whatever the size"
        )
    if at.task == "causal_lm":
        return "on sequences EK-FAC and Gauss-Newton solves tie (LDS 0.43 on a small transformer), and it costs one rotation per query"
    return "EK-FAC works for every layer (LDS 0.25 on a small CNN, of 0.77 that could be reached), at one rotation per query"
