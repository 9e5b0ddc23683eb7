"""The method `auto` stands for: the first rung of a ladder that fits model and size, and why; free of torch.

The ladder is exact, then approximate leave-one-out, then the whole curvature matrix, then the Gauss-Newton matrix shrunk towards EK-FAC, then
EK-FAC. The last two are in the order that was measured (docs/studies/curvature.md): shrunk solves predicted retraining better than EK-FAC on every
network, but pseudo-gradients of the training set are kept in memory, and where they are too many to factorise each query takes passes over them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from attribution_core.method_spec import (
    AutoMethod,
    EkfacMethod,
    ExactMethod,
    ExplicitMethod,
    GaussNewtonMethod,
    MethodSpec,
)
from attribution_core.spec import Spec

MAX_EXACT_SIDE = 16_384
MAX_EXPLICIT_PARAMETERS = 2_000
MAX_EXPLICIT_WORK = 10_000_000
# Parameters times examples up to which a query's ten passes, if it takes any, last seconds at most, and every example's pseudo-gradients fit in memory.
MAX_SOLVE_WORK = 200_000_000
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
        determined_alone: whether some example alone determines a parameter of a linear model, so that only a penalty leaves one without it.
    """

    architecture: str
    task: str
    num_parameters: int
    num_examples: int
    num_features: int | None = None
    all_layers: bool = True
    determined_alone: bool = False


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
    for rung in (_exact, _explicit, _gauss_newton):
        name, method, reason = rung(asked, situation)
        considered.append(Rung(method=name, taken=method is not None, reason=reason))
        if method is not None:
            return method, Choice(asked=asked, reason=reason, considered=considered)
    reason = "EK-FAC works for every layer, at one rotation per query whatever the size"
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
    if at.num_examples == 1:
        return "exact", None, "exact attribution leaves single examples out, and of one example nothing would be left"
    if at.determined_alone and asked.l2 == 0:
        return (
            "exact",
            None,
            "without some example the others do not determine the model (leverage 1), and there is no l2",
        )
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


def _gauss_newton(asked: AutoMethod, at: Situation) -> tuple[str, MethodSpec | None, str]:
    if at.num_parameters * at.num_examples > MAX_SOLVE_WORK:
        reason = f"a query may take passes over {at.num_examples:,} examples of {at.num_parameters:,} parameters, which is too long"
        return "gauss_newton", None, reason
    reason = (
        "Gauss-Newton solves shrunk towards EK-FAC ranked retrainings better than EK-FAC on every network measured, for a factorisation by "
        "the fit, or about ten passes over the training set's pseudo-gradients per query; the size of its predictions needs an evaluation's calibration"
    )
    return "gauss_newton", GaussNewtonMethod(type="gauss_newton"), reason
