"""Methods that learn from a bank of real retrainings."""

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from attribution_core.method_spec.base import MethodBase, Notion, QueryRows
from attribution_core.training.spec import Protocol, Sizes


class BankMethodBase(MethodBase):
    """A method that learns from real retrainings on random subsets: what they measure for a query is told by running them."""

    needs: ClassVar[tuple[str, ...]] = ("checkpoints", "recipe", "bank")
    self_influence: ClassVar[bool] = False
    keeps: ClassVar[Literal["features", "scores", "bank"]] = "bank"
    least_subsets: ClassVar[int] = 2
    shares: ClassVar[tuple[float, float]] = (0.0, 1.0)  # between which it takes a bank's alpha
    sizes: ClassVar[Sizes] = "fixed"  # of the subsets that it learns from
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


class SemivalueMethodBase(BankMethodBase):
    """An example's marginal contribution to subsets of every size, weighted by size; every retraining is used for every example."""

    notion: ClassVar[Notion] = "game_theoretic"
    sizes: ClassVar[Sizes] = "varied"
    least_subsets: ClassVar[int] = 12
    contrasts: ClassVar[bool] = True
    bank: Protocol = Field(
        default=Protocol(subsets=100, sizes="varied"),
        description="The retrainings it learns from, of varied sizes; what exists of the bank is used again.",
    )

    @property
    @abstractmethod
    def parameters(self) -> tuple[float, float]:
        """α and β of Beta Shapley."""


class ShapleyMethod(SemivalueMethodBase):
    """Data Shapley values: the mean marginal contribution over sizes; they sum to what training on everything changes."""

    reference: ClassVar[str] = "Ghorbani & Zou 2019, Data Shapley; Li & Yu 2024, One Sample Fits All"
    type: Literal["shapley"]

    @property
    def parameters(self) -> tuple[float, float]:
        """α = β = 1."""
        return 1.0, 1.0


class BetaShapleyMethod(SemivalueMethodBase):
    """Beta Shapley values: marginal contributions weighted towards small or large subsets."""

    reference: ClassVar[str] = "Kwon & Zou 2022, Beta Shapley; Li & Yu 2024, One Sample Fits All"
    type: Literal["beta_shapley"]
    alpha: float = Field(default=4.0, gt=0, le=1000, description="The larger, the more small subsets count.")
    beta: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="The larger, the more large subsets count; with alpha 1 and beta 1, Shapley.",
    )

    @property
    def parameters(self) -> tuple[float, float]:
        """α and β."""
        return self.alpha, self.beta
