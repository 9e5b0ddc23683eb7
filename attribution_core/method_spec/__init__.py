"""Attribution methods as a caller asks for them; form only, free of torch."""

from typing import Annotated

from pydantic import Field

from attribution_core.method_spec.auto import AutoMethod
from attribution_core.method_spec.bank import (
    AmeMethod,
    BankMethodBase,
    BanzhafMethod,
    BetaShapleyMethod,
    DatamodelsMethod,
    EmpiricalInfluenceMethod,
    PosteriorMethod,
    SemivalueMethodBase,
    ShapleyMethod,
)
from attribution_core.method_spec.base import (
    DEFAULT_BITS,
    DEFAULT_DIM,
    PROJECTION_VERSION,
    CopyTraining,
    Damping,
    GradientMethodBase,
    GroupEstimator,
    MethodBase,
    Notion,
    Perturbation,
    PerturbedMethodBase,
    ProjectionSpec,
    QueryRows,
    TemperedMethodBase,
)
from attribution_core.method_spec.exact import ExactMethod
from attribution_core.method_spec.features import (
    GradCosMethod,
    GradDotMethod,
    LograMethod,
    RepresentationMethod,
    RepresenterMethod,
    TrakMethod,
)
from attribution_core.method_spec.fisher import (
    DAMPING_OF_COPIES,
    DEFAULT_SHRINKAGE,
    SHRINKAGE_OF_COPIES,
    DataInfMethod,
    DiagonalMethod,
    EigenvalueCorrected,
    EkfacMethod,
    FisherMethod,
    FisherSampling,
    GaussNewtonMethod,
    KfacMethod,
)
from attribution_core.method_spec.hessian import ArnoldiMethod, CgMethod, ExplicitMethod, HessianMethod, LissaMethod
from attribution_core.method_spec.trajectory import GasMethod, MagicMethod, SourceMethod, TracinMethod

__all__ = [
    "DAMPING_OF_COPIES",
    "DEFAULT_BITS",
    "DEFAULT_DIM",
    "DEFAULT_SHRINKAGE",
    "METHODS",
    "OFFERED",
    "PROJECTION_VERSION",
    "SHRINKAGE_OF_COPIES",
    "AmeMethod",
    "ArnoldiMethod",
    "AutoMethod",
    "BankMethodBase",
    "BanzhafMethod",
    "BetaShapleyMethod",
    "CgMethod",
    "CopyTraining",
    "Damping",
    "DataInfMethod",
    "DatamodelsMethod",
    "DiagonalMethod",
    "EigenvalueCorrected",
    "EkfacMethod",
    "EmpiricalInfluenceMethod",
    "ExactMethod",
    "ExplicitMethod",
    "FisherMethod",
    "FisherSampling",
    "GasMethod",
    "GaussNewtonMethod",
    "GradCosMethod",
    "GradDotMethod",
    "GradientMethodBase",
    "GroupEstimator",
    "HessianMethod",
    "KfacMethod",
    "LissaMethod",
    "LograMethod",
    "MagicMethod",
    "MethodBase",
    "MethodSpec",
    "Notion",
    "Perturbation",
    "PerturbedMethodBase",
    "PosteriorMethod",
    "ProjectionSpec",
    "QueryRows",
    "RepresentationMethod",
    "RepresenterMethod",
    "SemivalueMethodBase",
    "ShapleyMethod",
    "SourceMethod",
    "TemperedMethodBase",
    "TracinMethod",
    "TrakMethod",
]

MethodSpec = Annotated[
    TrakMethod
    | EkfacMethod
    | KfacMethod
    | DiagonalMethod
    | GaussNewtonMethod
    | DataInfMethod
    | ExplicitMethod
    | CgMethod
    | LissaMethod
    | ArnoldiMethod
    | LograMethod
    | GradDotMethod
    | GradCosMethod
    | TracinMethod
    | GasMethod
    | SourceMethod
    | MagicMethod
    | PosteriorMethod
    | DatamodelsMethod
    | EmpiricalInfluenceMethod
    | AmeMethod
    | BanzhafMethod
    | ShapleyMethod
    | BetaShapleyMethod
    | RepresentationMethod
    | RepresenterMethod
    | ExactMethod,
    Field(discriminator="type"),
]
METHODS: dict[str, type[MethodBase]] = {
    method.model_fields["type"].annotation.__args__[0]: method
    for method in MethodSpec.__origin__.__args__  # type: ignore[attr-defined]
}
# What an index can be asked for; `auto` becomes one of the others before anything is fitted.
OFFERED: dict[str, type[MethodBase]] = {**METHODS, "auto": AutoMethod}
