"""Methods that follow the training: over its checkpoints, or by replaying it."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from attribution_core.method_spec.base import GradientMethodBase, MethodBase, QueryRows
from attribution_core.method_spec.fisher import FisherSampling
from attribution_core.spec import Seed


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
    def passes(self) -> tuple[str, ...]:
        """Passes of every member of the ensemble over the training set that a fit takes, in order."""
        return ("covariance", "eigenvalues", "features")


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
