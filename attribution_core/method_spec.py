"""Attribution methods as a caller asks for them; form only, free of torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from attribution_core.spec import Seed, Spec
from attribution_core.training.spec import Protocol

# Part of every fingerprint: stored features depend on how projections are generated.
PROJECTION_VERSION = 1
Notion = Literal["predictive", "corroborative", "game_theoretic"]
GroupEstimator = Literal["additive", "newton"]
Damping = Annotated[float, Field(ge=0, le=1e12)]
# Default dampings: from the least that keeps rounding small to that of the largest ratio which was measured.
MIN_DEFAULT_DAMPING = 0.001
MOST_PARAMETERS_PER_TARGET = 32
_LAYER_DAMPING = "Default damping, as a multiple of each layer's mean eigenvalue."
_DAMPING = "Default damping, as a multiple of the curvature's mean eigenvalue."


class ProjectionSpec(Spec):
    """A seeded random projection of gradients."""

    type: Literal["sjlt", "rademacher", "gaussian", "factored"] = Field(
        default="sjlt",
        description="`factored` projects each layer's input and output gradient apart, so that no gradient is ever formed.",
    )
    dim: int = Field(default=1024, ge=8, le=65_536, description="Numbers kept per example and checkpoint.")
    seed: Seed = 0


class MethodBase(Spec):
    """What every method says about itself."""

    notion: ClassVar[Notion] = "predictive"
    needs: ClassVar[tuple[str, ...]] = ("checkpoints",)
    query_cost: ClassVar[Literal["inline", "job"]] = "inline"
    extends: ClassVar[bool] = False  # whether a fitted index can take more rows with its factors kept
    exact_rows: ClassVar[bool] = False  # whether stored rows are the method's own definition, so nothing is re-scored
    reference: ClassVar[str] = ""
    # How the effect of a group of training examples can be told: as the sum of their scores, or with the curvature they leave.
    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive",)
    checkpoint_needs: ClassVar[tuple[str, ...]] = ()
    # Whether it tells how each training example influences itself: not where that takes a pass over the training set for each.
    self_influence: ClassVar[bool] = True
    # What an index of it holds: a row per training example, a score per training example and named query, or what it learnt from a bank.
    keeps: ClassVar[Literal["features", "scores", "bank"]] = "features"

    @property
    def damped(self) -> bool:
        """Whether its scores depend on a damping that a query may name."""
        return "damping" in type(self).model_fields

    @property
    def follows_training(self) -> bool:
        """Whether checkpoints are moments of trainings rather than an ensemble."""
        return bool(self.checkpoint_needs)

    @property
    def stages(self) -> tuple[str, ...]:
        """Passes over the training set that a fit takes, in order."""
        return ("features",)


class GradientMethodBase(MethodBase):
    """A method whose scores are inner products of gradients."""

    projection: ProjectionSpec = ProjectionSpec()


class FisherSampling(GradientMethodBase):
    """A method whose curvature is the model's Fisher matrix."""

    fisher: Literal["auto", "exact", "sampled", "empirical"] = Field(
        default="auto",
        description="Labels enumerated, sampled from the model, or the data's; auto enumerates up to 32 classes.",
    )
    samples: int = Field(default=1, ge=1, le=64, description="Labels sampled per example.")
    seed: Seed = 0


class FisherMethod(FisherSampling):
    """A method that inverts the Fisher matrix."""

    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive", "newton")
    # The default damping where the data say as little of each parameter as on the benchmark's convolutional networks, and less.
    max_default: ClassVar[float] = 1.0
    damping: Damping | None = Field(
        default=None,
        description="Default damping, as a multiple of each layer's mean eigenvalue. If null, it follows how well the data determine "
        "the curvature: it grows with the square of attributed parameters per training target (example, or predicted token), up to a bound.",
    )

    def damping_for(self, parameters_per_target: float) -> float:
        """Return the default damping, which where none is named grows with how little the data say of each parameter.

        The law and its constants are measured: docs/studies/curvature.md.
        """
        if self.damping is not None:
            return self.damping
        scarcity = min(parameters_per_target / MOST_PARAMETERS_PER_TARGET, 1.0)
        return max(MIN_DEFAULT_DAMPING, self.max_default * scarcity**2)


class EkfacMethod(FisherMethod):
    """Influence functions with eigenvalue-corrected Kronecker-factored curvature (true Fisher)."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "George et al. 2018; Grosse et al. 2023, Studying LLM Generalization with Influence Functions"
    )
    type: Literal["ekfac"]

    @property
    def stages(self) -> tuple[str, ...]:
        """Passes over the training set that a fit takes, in order."""
        return ("covariance", "eigenvalues", "features")


class KfacMethod(FisherMethod):
    """Influence functions with Kronecker-factored curvature, without the eigenvalue correction."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Martens & Grosse 2015, Optimizing Neural Networks with Kronecker-factored Approximate Curvature"
    )
    type: Literal["kfac"]

    @property
    def stages(self) -> tuple[str, ...]:
        """Passes over the training set that a fit takes, in order."""
        return ("covariance", "features")


class DiagonalMethod(FisherMethod):
    """Influence functions with the Fisher matrix's diagonal."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = "Becker & LeCun 1988; Kirkpatrick et al. 2017"
    type: Literal["diagonal"]

    @property
    def stages(self) -> tuple[str, ...]:
        """Passes over the training set that a fit takes, in order."""
        return ("eigenvalues", "features")


class GaussNewtonMethod(FisherMethod):
    """Influence functions with the true Gauss-Newton matrix shrunk towards EK-FAC: what matters of it factorised by the fit, else by iterations."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = "Teso et al. 2021; Bae et al. 2022; Wang et al. 2025 (ASTRA)"
    type: Literal["gauss_newton"]
    max_default: ClassVar[float] = 10.0
    shrinkage: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="Weight ρ of EK-FAC in the curvature `(1 - ρ) Gauss-Newton + ρ EK-FAC` that is solved; 0 is the Gauss-Newton matrix itself.",
    )
    negligible: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Of pseudo-gradients with less than this times the average part of the curvature's trace only the diagonal is kept: an example "
        "that the model is sure of has hardly any curvature. Never more than that part of the trace is left out.",
    )
    iterations: int = Field(
        default=20,
        ge=1,
        le=1000,
        description="Conjugate gradient steps at most, where no factorisation answers: with more pseudo-gradients left than the fit factorises "
        "(4,096 at most), at another damping than the index's own, or without a group.",
    )
    tolerance: float = Field(default=1e-2, gt=0, lt=1, description="Relative residual at which such a solve stops.")
    curvature_examples: int | None = Field(
        default=None,
        ge=1,
        description="Training examples whose curvature is used, evenly spread; as many as fit 1 GiB by default.",
    )

    @property
    def stages(self) -> tuple[str, ...]:
        """Passes over the training set that a fit takes, in order."""
        return ("covariance", "eigenvalues", "features")


class DataInfMethod(GradientMethodBase):
    """Influence functions with each layer's empirical Fisher, the inverse of a mean replaced by the mean of inverses."""

    self_influence: ClassVar[bool] = False
    reference: ClassVar[str] = "Kwon et al. 2024, DataInf"
    type: Literal["datainf"]
    damping: Damping = Field(default=0.1, description=_LAYER_DAMPING)
    curvature_examples: int | None = Field(
        default=None,
        ge=1,
        description="Training examples whose curvature is used, evenly spread; as many as fit 1 GiB by default.",
    )


class HessianMethod(GradientMethodBase):
    """A method whose curvature is the mean loss's Hessian, or its Gauss-Newton part."""

    damping: Damping = Field(default=0.1, description=_DAMPING)
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    l2: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Strength of the L2 penalty `l2/2 ‖θ‖²` the model was trained with, added to the curvature.",
    )


class ExplicitMethod(HessianMethod):
    """Influence functions with the whole curvature matrix, for models of at most 4,096 attributed parameters."""

    reference: ClassVar[str] = "Koh & Liang 2017, Understanding Black-box Predictions via Influence Functions"
    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive", "newton")
    type: Literal["explicit"]

    @property
    def stages(self) -> tuple[str, ...]:
        """Passes over the training set that a fit takes, in order."""
        return ("hessian", "features")


class CgMethod(HessianMethod):
    """Influence functions by conjugate gradients on Hessian-vector products over the training set."""

    self_influence: ClassVar[bool] = False
    reference: ClassVar[str] = "Martens 2010; Koh & Liang 2017, section 3"
    type: Literal["cg"]
    iterations: int = Field(default=50, ge=1, le=1000)
    tolerance: float = Field(default=1e-4, gt=0, lt=1, description="Relative residual at which a solve stops.")
    curvature_examples: int | None = Field(
        default=None, ge=1, description="Training examples used, evenly spread; all by default."
    )


class LissaMethod(HessianMethod):
    """Influence functions by a truncated Neumann series over mini-batches."""

    self_influence: ClassVar[bool] = False
    reference: ClassVar[str] = (
        "Agarwal et al. 2017, Second-Order Stochastic Optimization for Machine Learning in Linear Time"
    )
    type: Literal["lissa"]
    depth: int = Field(default=200, ge=1, le=100_000, description="Terms of the series; one mini-batch each.")
    batch: int = Field(default=256, ge=1, le=65_536, description="Examples per term.")
    seed: Seed = 0


class ArnoldiMethod(HessianMethod):
    """Influence functions in the span of the curvature's leading eigenvectors, found by Arnoldi iteration."""

    reference: ClassVar[str] = "Schioppa et al. 2022, Scaling Up Influence Functions"
    type: Literal["arnoldi"]
    iterations: int = Field(default=100, ge=2, le=2000, description="Dimension of the Krylov space.")
    rank: int = Field(default=50, ge=1, le=2000, description="Eigenvectors kept.")
    seed: Seed = 0

    @property
    def stages(self) -> tuple[str, ...]:
        """Passes over the training set that a fit takes, in order."""
        return ("krylov", "features")


class LograMethod(GradientMethodBase):
    """Influence functions in a space where each layer's input and output gradient were projected apart, with that space's Fisher matrix."""

    extends: ClassVar[bool] = True
    exact_rows: ClassVar[bool] = True
    reference: ClassVar[str] = "Choe et al. 2024, What is Your Data Worth to GPT?"
    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive", "newton")
    type: Literal["logra"]
    projection: ProjectionSpec = ProjectionSpec(type="factored")
    damping: Damping = Field(default=0.3, description=_LAYER_DAMPING)


class TrakMethod(GradientMethodBase):
    """TRAK: the linearised model's one-step update, in a random projection, averaged over checkpoints."""

    extends: ClassVar[bool] = True
    exact_rows: ClassVar[bool] = True
    reference: ClassVar[str] = "Park et al. 2023, TRAK: Attributing Model Behavior at Scale"
    estimators: ClassVar[tuple[GroupEstimator, ...]] = ("additive", "newton")
    type: Literal["trak"]
    damping: Damping = Field(default=3.0, description="Default damping, as a multiple of the mean eigenvalue.")
    curvature: Literal["gradient", "gauss_newton", "fisher"] = Field(
        default="gauss_newton",
        description="`gradient`: the published kernel, whose scores have an arbitrary scale. `gauss_newton`: each row "
        "weighted by p(1-p), which puts scores in units of the measurement. `fisher`: the Gauss-Newton matrix of all "
        "classes (or sampled tokens), projected.",
    )
    soft_threshold: float | None = Field(
        default=None, ge=0, le=1e12, description="Shrink scores towards 0 by this much, as published; off by default."
    )

    @property
    def stages(self) -> tuple[str, ...]:
        """Passes over the training set that a fit takes, in order."""
        return ("kernel", "features") if self.curvature == "fisher" else ("features",)


class GradDotMethod(GradientMethodBase):
    """Inner product of the query's and the training example's gradients (one-checkpoint TracIn, identity curvature)."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = "Pruthi et al. 2020, Estimating Training Data Influence by Tracing Gradient Descent"
    type: Literal["grad_dot"]


class GradCosMethod(GradientMethodBase):
    """Cosine of the query's and the training example's gradients."""

    extends: ClassVar[bool] = True
    reference: ClassVar[str] = "Hammoudeh & Lowd 2022, Identifying a Training-Set Attack's Target"
    type: Literal["grad_cos"]


class TracinMethod(GradientMethodBase):
    """TracInCP: inner products of gradients, each checkpoint's times its learning rate, summed over the training.

    A score is the sum over checkpoints of the measurement's first-order change when the example alone makes one step. Several runs are
    averaged.
    """

    needs: ClassVar[tuple[str, ...]] = ("checkpoints with learning rates",)
    reference: ClassVar[str] = "Pruthi et al. 2020, Estimating Training Data Influence by Tracing Gradient Descent"
    checkpoint_needs: ClassVar[tuple[str, ...]] = ("learning_rate",)
    type: Literal["tracin"]


class GasMethod(GradientMethodBase):
    """Gradient aggregated similarity: cosines of gradients, each checkpoint's times its learning rate, summed over the training.

    Several runs are averaged. Scores have no unit of the measurement.
    """

    needs: ClassVar[tuple[str, ...]] = ("checkpoints with learning rates",)
    reference: ClassVar[str] = "Hammoudeh & Lowd 2022, Identifying a Training-Set Attack's Target"
    checkpoint_needs: ClassVar[tuple[str, ...]] = ("learning_rate",)
    type: Literal["gas"]


class SourceMethod(FisherSampling):
    """SOURCE: training unrolled over a few segments, each with one EK-FAC curvature and mean gradients; for models trained by SGD.

    Takes several checkpoints of each run, with their steps and learning rates; a run begins at step 0. Several runs are averaged.
    """

    needs: ClassVar[tuple[str, ...]] = ("checkpoints with steps and learning rates",)
    reference: ClassVar[str] = "Bae et al. 2024, Training Data Attribution via Approximate Unrolled Differentiation"
    checkpoint_needs: ClassVar[tuple[str, ...]] = ("learning_rate", "step")
    type: Literal["source"]
    segments: Annotated[int, Field(ge=1, le=256)] | Literal["learning_rate"] = Field(
        default=3,
        description="How many, of about as many checkpoints each; or a new one wherever the learning rate changes.",
    )
    momentum: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Training's momentum μ, by which a step goes 1/(1-μ) as far in the long run.",
    )
    l2: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Training's weight decay: the penalty `l2/2 ‖θ‖²`, added to the curvature.",
    )

    @property
    def stages(self) -> tuple[str, ...]:
        """Passes over the training set that a fit takes, in order."""
        return ("covariance", "eigenvalues", "features")


class QueryRows(Spec):
    """Rows of a data set that an index is to answer for."""

    dataset: str = Field(min_length=1, max_length=128, description="Id or name.")
    rows: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=4096)


class MagicMethod(MethodBase):
    """MAGIC: the exact derivative of the measurement by every example's weight, replaying the training of one seed backwards.

    Training is repeated by the model's recipe, so no checkpoint is needed. The index answers for the queries named here and no others.
    A score is what dropping the example from its batches, nothing else changed, does to that very run, to first order.
    """

    needs: ClassVar[tuple[str, ...]] = ("recipe", "queries")
    self_influence: ClassVar[bool] = False
    keeps: ClassVar[Literal["features", "scores", "bank"]] = "scores"
    reference: ClassVar[str] = "Ilyas & Engstrom 2025, MAGIC: Near-Optimal Data Attribution for Deep Learning"
    type: Literal["magic"]
    queries: QueryRows
    seed: Seed = Field(default=0, description="Of the training that is replayed.")
    subsets: int = Field(
        default=8,
        ge=0,
        le=1024,
        description="Masked retrainings by which the training's smoothness, and with it what an exact derivative can "
        "predict, is measured; twice as many trainings.",
    )
    alpha: float = Field(default=0.95, gt=0, lt=1, description="Share of the examples that each of them keeps.")

    @property
    def stages(self) -> tuple[str, ...]:
        """Parts of a fit, in order."""
        return ("recording", "masked", "replay") if self.subsets else ("recording", "replay")

    @property
    def trainings(self) -> int:
        """How many times a fit goes through the steps of the training, forwards or backwards."""
        return 1 + (2 * self.subsets + 2 if self.subsets else 0) + len(self.queries.rows)


class RepresentationMethod(MethodBase):
    """Similarity of penultimate representations: evidence, not causation."""

    notion: ClassVar[Notion] = "corroborative"
    extends: ClassVar[bool] = True
    exact_rows: ClassVar[bool] = True
    reference: ClassVar[str] = "Hanawa et al. 2021, Evaluation of Similarity-based Explanations"
    type: Literal["representation"]
    similarity: Literal["cosine", "dot"] = "cosine"


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


class BankMethodBase(MethodBase):
    """A method that learns from real retrainings on random subsets: what they measure for a query is told by running them."""

    needs: ClassVar[tuple[str, ...]] = ("checkpoints", "recipe", "bank")
    self_influence: ClassVar[bool] = False
    keeps: ClassVar[Literal["features", "scores", "bank"]] = "bank"
    least_subsets: ClassVar[int] = 2
    shares: ClassVar[tuple[float, float]] = (0.0, 1.0)  # between which it takes a bank's alpha
    contrasts: ClassVar[bool] = False  # whether it needs of every example a subset with it and one without
    bank: Protocol = Field(
        default=Protocol(subsets=50),
        description="The retrainings it learns from; what exists of the bank is used again.",
    )

    @property
    def stages(self) -> tuple[str, ...]:
        """Parts of a fit, in order."""
        return ("retraining",)


class PosteriorMethod(BankMethodBase):
    """A datamodel whose prior mean is other indexes' scores, mixed, and whose evidence is a bank of retrainings; it knows its own uncertainty.

    Everything that queries have in common (how far to trust each prior, how large effects are) is learnt from the named queries and the one that
    is asked; each query is answered for itself.
    """

    needs: ClassVar[tuple[str, ...]] = ("checkpoints", "recipe", "bank", "priors", "queries")
    least_subsets: ClassVar[int] = 3
    reference: ClassVar[str] = "Ours: a Gaussian linear datamodel (Ilyas et al. 2022) conditioned on retrainings"
    type: Literal["posterior"]
    prior: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(min_length=1, max_length=8)] = (
        Field(description="Indexes of the same model, data set and measurement whose scores are mixed; ids or names.")
    )
    queries: QueryRows = Field(
        description="Queries from which hyper-parameters are learnt; 20 to 100 unlike the training set."
    )


class DatamodelsMethod(BankMethodBase):
    """Datamodels: each query's measurement regressed on which examples a retraining kept."""

    least_subsets: ClassVar[int] = 10
    reference: ClassVar[str] = "Ilyas et al. 2022, Datamodels: Predicting Predictions from Training Data"
    type: Literal["datamodels"]
    penalty: Literal["lasso", "ridge"] = Field(default="lasso", description="Its strength is cross-validated.")


class EmpiricalInfluenceMethod(BankMethodBase):
    """The mean measurement of retrainings that kept an example, minus that of those that did not."""

    contrasts: ClassVar[bool] = True
    reference: ClassVar[str] = "Feldman & Zhang 2020, What Neural Networks Memorize and Why"
    type: Literal["empirical_influence"]


class AmeMethod(BankMethodBase):
    """Average marginal effects: a LASSO on masks scaled by how likely an example was kept."""

    least_subsets: ClassVar[int] = 10
    reference: ClassVar[str] = "Lin et al. 2022, Measuring the Effect of Training Data on Deep Learning Predictions"
    type: Literal["ame"]


class BanzhafMethod(BankMethodBase):
    """Data Banzhaf values, every retraining used for every example; takes subsets that keep half."""

    notion: ClassVar[Notion] = "game_theoretic"
    shares: ClassVar[tuple[float, float]] = (0.4, 0.6)
    contrasts: ClassVar[bool] = True
    reference: ClassVar[str] = "Wang & Jia 2023, Data Banzhaf"
    type: Literal["banzhaf"]


class AutoMethod(MethodBase):
    """The first of exact, explicit, gauss_newton and ekfac that fits model and size; the index says which, and why."""

    reference: ClassVar[str] = "The ladder and what it was measured on: docs/methods.md"
    type: Literal["auto"]
    l2: float = Field(
        default=0.0, ge=0, le=1e6, description="What the model was trained with: the mean loss + l2/2 · ‖θ‖²."
    )


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
    | RepresentationMethod
    | ExactMethod,
    Field(discriminator="type"),
]
METHODS: dict[str, type[MethodBase]] = {
    method.model_fields["type"].annotation.__args__[0]: method
    for method in MethodSpec.__origin__.__args__  # type: ignore[attr-defined]
}
# What an index can be asked for; `auto` becomes one of the others before anything is fitted.
OFFERED: dict[str, type[MethodBase]] = {**METHODS, "auto": AutoMethod}
