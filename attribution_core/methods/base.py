"""What a feature method is: rows for training examples, a preconditioned side for queries, and inner products between them.

A method looks at one checkpoint at a time; an index averages over its checkpoints by laying their rows side by side.
With `φ_i = -∇ℓ_i`, `n` training examples and the mean curvature `H̄`, scores are `τ_i(z) = (1/n) ∇m_zᵀ (H̄ + λ)⁻¹ φ_i`: positive when having
example i raises the measurement.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from attribution_core.curvature import Curvature
from attribution_core.curvature.fisher import Fisher, Observed, Tempering, observe, scaled
from attribution_core.curvature.group import Group
from attribution_core.curvature.whitening import Whitening
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.gradients import AnyRotation, GradientCapture, LayerGradient, Pass
from attribution_core.projection import Projection
from attribution_core.tasks import Task

Arrays = Mapping[str, np.ndarray]


@contextmanager
def refusing_inputs() -> Iterator[None]:
    """Say that the data does not fit the model, where a forward pass fails: nothing else than its inputs can be at fault.

    Raises:
        InvalidInputError: instead of whatever torch raised.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInputError(f"the model cannot be run on these examples: {reason}") from error


# Products of one example with one vector that the curvature of a group may take while a question waits: some seconds.
MAX_GROUP_PRODUCTS = 2_000_000


class CheckedCapture(GradientCapture):
    """A capture whose forward pass refuses inputs that the model cannot take."""

    def run(self, forward: Callable[[nn.Module], Tensor], size: int | None = None) -> Pass:
        """Run `forward(module)` once and keep what gradients need.

        Raises:
            InvalidInputError: if the forward pass fails.
        """
        with refusing_inputs():
            return super().run(forward, size)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, loaded, with all that a method may ask of it.

    Attributes:
        measurement: what queries are measured by.
        num_examples: n, the size of the training set.
    """

    module: nn.Module
    task: Task
    measurement: str
    num_examples: int
    capture: GradientCapture

    def run(self, batch: Batch) -> Pass:
        """Return a forward pass that can be differentiated.

        Raises:
            InvalidInputError: if the examples or their targets do not fit the model.
        """
        run = self.capture.run(batch.forward, len(batch))
        self.task.check(run.output, batch)
        return run

    @torch.no_grad()
    def output(self, batch: Batch) -> Tensor:
        """Return the model's output.

        Raises:
            InvalidInputError: if the examples or their targets do not fit the model.
        """
        with refusing_inputs():
            output = self.capture.output(batch.forward)
        self.task.check(output, batch)
        return output


@dataclass(frozen=True)
class TrainRows:
    """Encoded training examples.

    Attributes:
        rows: (batch, k).
        weights: (batch,), from which follows what a row's inner products are multiplied with (`FeatureMethod.counted`).
        self_influence: (batch,), `τ_i(z_i)`; None where it needs all rows.
        measured: (batch, k), the example's own query side, where self-influence comes later and it is not `rows` itself.
    """

    rows: Tensor
    weights: Tensor
    self_influence: Tensor | None = None
    measured: Tensor | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is known by name, as float32."""
        return {name: value.detach().float().cpu().numpy() for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class QuerySide:
    """Encoded queries.

    Attributes:
        output: the model's outputs.
        rows: (queries, k), what stored rows are multiplied with.
        gradients: per block (queries, groups, d_out, d_in), what exact gradients are multiplied with; None if rows are exact.
        measured: `∇m_z` per block, as long as it is not preconditioned.
    """

    output: Tensor
    rows: Tensor
    gradients: list[Tensor] | None = None
    measured: Sequence[LayerGradient] = ()

    def __getitem__(self, part: slice) -> "QuerySide":
        gradients = None if self.gradients is None else [gradient[part] for gradient in self.gradients]
        return QuerySide(self.output[part], self.rows[part], gradients)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and the whole gradients."""
        return sum(values.nbytes for values in (self.rows, *(self.gradients or ())))

    @property
    def finite(self) -> Tensor:
        """Whether all that training examples are multiplied with is finite, (queries,)."""
        # A sum needs no copy, and is not finite if one of its terms is not.
        sums = [values.flatten(1).sum(1) for values in (self.rows, *(self.gradients or ()))]
        return torch.stack(sums).isfinite().all(0)


class FeatureMethod(ABC):
    """One method on one checkpoint.

    Attributes:
        linear: scores are linear in the training gradient, so a group's effect needs one summed gradient only.
        shared: the training set shares the effect, so that scores are proportional to 1/n.
    """

    linear: ClassVar[bool] = False
    shared: ClassVar[bool] = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @property
    def solves_by_passes(self) -> bool:
        """Whether preconditioning a batch of queries takes passes over training examples."""
        return False

    @property
    @abstractmethod
    def dim(self) -> int:
        """Numbers per stored row."""

    @abstractmethod
    def encode_train(self, batch: Batch) -> TrainRows:
        """Return the stored side of training examples."""

    def train_weights(self, batch: Batch) -> Tensor:
        """Return what the inner products of training examples' rows are multiplied with, (batch,)."""
        return torch.ones(len(batch))

    def counted(self, weights: Tensor) -> Tensor:
        """Return the same from the weights that rows were encoded with: some methods scale them by what all rows tell."""
        return weights

    @abstractmethod
    def encode_query(self, batch: Batch) -> QuerySide:
        """Return the query side before preconditioning."""

    def precondition(self, query: QuerySide, damping: float) -> QuerySide:
        """Apply the damped inverse curvature to the query side."""
        return query

    def exact_scores(self, query: QuerySide, batch: Batch) -> Tensor:
        """Return unprojected scores (queries, batch) of training examples."""
        raise TypeError(f"{type(self).__name__} has no scores beyond its stored rows")

    def group_effect(self, query: QuerySide, batch: Batch) -> Tensor:
        """Return the summed exact scores (queries,) of a batch of training examples, without its per-example gradients."""
        raise TypeError(f"{type(self).__name__} is not linear in the training gradient")

    def newton_effect(self, queries: Batch, group: Group, damping: float) -> Tensor:
        """Return what having a group is worth (queries,), with the curvature that it leaves behind: `∇mᵀ (H - H_F)⁻¹ Σ_F φ`.

        H sums over examples. λ keeps the size it has in that sum, so that it counts for more in the mean of fewer.

        Raises:
            InvalidInputError: if the method cannot tell.
            SingularCurvatureError: if what is left cannot be inverted.
        """
        raise InvalidInputError("the method has no newton estimator: use additive", "/estimator")


class GradientMethod(FeatureMethod):
    """Methods that compare gradients: training examples by `φ_i = -∇ℓ_i`, queries by a preconditioned `∇m_z`.

    Args:
        curvature: preconditions the query side.
        damping: where a query names none.
        projection: of stored rows and queries; None where gradients are stored whole, as factors.
        whitened_at: the damping of the basis in which both are projected; None for the parameters' own basis.
        tempering: what training examples count for beyond their loss gradient; nothing by default.
        turned: whether gradients that are stored whole have their inputs along the axes of the curvature's rotations, and so queries.
    """

    linear = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        curvature: Curvature,
        damping: float,
        projection: Projection | None,
        whitened_at: float | None = None,
        tempering: Tempering | None = None,
        *,
        turned: bool = False,
    ) -> None:
        super().__init__(checkpoint)
        self.turned = turned
        self.whitened_at = whitened_at
        self.tempering = tempering or Tempering()
        self.curvature = curvature
        self.default_damping = damping
        self.projection = projection

    @property
    def solves_by_passes(self) -> bool:
        """Whether the curvature is a product over the training set."""
        return not self.curvature.solves_cheaply

    @property
    def dim(self) -> int:
        """The projection's dimension."""
        return 0 if self.projection is None else self.projection.dim

    @property
    def rotations(self) -> Sequence[AnyRotation] | None:
        """Of stored gradients and of queries; None for the parameters' own axes."""
        return self.curvature.rotations if self.turned else None

    @cached_property
    def whitening(self) -> Sequence[Whitening] | None:
        """The basis of each block in which rows and queries are projected; None for the parameters' own."""
        return None if self.whitened_at is None else self.curvature.whitening(self.whitened_at)

    def encode_train(self, batch: Batch) -> TrainRows:
        """Return projected `φ_i`, and `τ_i(z_i)`."""
        return self.encode_observed(self.attributed(batch))

    def attributed(self, batch: Batch) -> Observed:
        """Return a batch of training examples as scores count them."""
        return self.observe(batch).tempered(self.tempering)

    def observe(self, batch: Batch, fisher: Fisher | None = None) -> Observed:
        """Run and differentiate a batch of training examples; their gradients are derivatives."""
        checkpoint = self.checkpoint
        run = checkpoint.run(batch)
        return observe(run, checkpoint.task, batch, checkpoint.measurement, fisher, checkpoint.run)

    def encode_observed(self, observed: Observed) -> TrainRows:
        """Return projected `φ_i`, and `τ_i(z_i)`, not a number where that would take a pass over the training set for each."""
        multiple = observed.multiple
        own = torch.full_like(multiple, torch.nan)
        if self.curvature.solves_cheaply:
            own = self._own_influence(observed)
        return TrainRows(
            rows=self._sketched(observed.direction) * multiple.unsqueeze(1),
            weights=torch.ones_like(multiple),
            self_influence=own / self.checkpoint.num_examples,
        )

    def _own_influence(self, observed: Observed) -> Tensor:
        if observed.losses is None:
            return observed.multiple * self.curvature.quadratic(observed.measured, self.default_damping)
        return observed.multiple * self.curvature.paired(observed.measured, observed.losses, self.default_damping)

    def encode_query(self, batch: Batch) -> QuerySide:
        """Return `∇m_z` as factors; rows and gradients follow when it is preconditioned."""
        run = self.checkpoint.run(batch)
        measured = self.checkpoint.task.measure(run.output, batch, self.checkpoint.measurement)
        gradients = run.gradients(measured)
        rows = gradients[0].inputs.new_zeros(len(batch), self.dim)
        return QuerySide(run.output.detach(), rows, measured=gradients)

    def precondition(self, query: QuerySide, damping: float) -> QuerySide:
        """Return `(1/n)(H̄ + λ)⁻¹ ∇m_z`, unprojected and projected."""
        # 1/n goes into the factors: a second copy of what is solved would be the peak of memory.
        share = query.measured[0].inputs.new_full((len(query.output),), 1 / self.checkpoint.num_examples)
        solve = self.curvature.solve_turned if self.turned else self.curvature.solve_factored
        solved = solve(scaled(query.measured, share), damping)
        return QuerySide(query.output, self._projected(solved, query.rows), solved)

    def exact_scores(self, query: QuerySide, batch: Batch) -> Tensor:
        """Return `⟨query, φ_i⟩` without projection."""
        return self.observed_scores(query, self.attributed(batch))

    def observed_scores(self, query: QuerySide, observed: Observed) -> Tensor:
        """Return scores (queries, batch) of observed training examples."""
        if self.linear:
            return self.scores_of(query, observed.direction) * observed.multiple
        return self.scores_of(query, observed.training)

    def scores_of(self, query: QuerySide, training: Sequence[LayerGradient]) -> Tensor:
        """Return scores (queries, batch) from training gradients."""
        return inner(query, training)

    def group_effect(self, query: QuerySide, batch: Batch) -> Tensor:
        """Return `⟨query, Σ φ_i⟩`."""
        return summed(query, self.attributed(batch).training)

    def newton_effect(self, queries: Batch, group: Group, damping: float) -> Tensor:
        """Return `∇mᵀ (H - H_F)⁻¹ Σ_F φ`, (queries,)."""
        products = self.curvature.products_without(len(group.rows))
        if products > MAX_GROUP_PRODUCTS:
            raise InvalidInputError(
                f"the curvature of {len(group.rows):,} examples takes {products:,} products of one example, more than {MAX_GROUP_PRODUCTS:,}: "
                "use additive",
                "/estimator",
            )
        query = self.encode_query(queries)
        left = self.curvature.without(group)
        solved = [gradient / group.num_examples for gradient in left.solve_factored(query.measured, damping)]
        side = QuerySide(query.output, query.rows, solved)
        return torch.stack([self.group_effect(side, batch) for batch in group.batches()]).sum(0)

    def _sketched(self, gradients: Sequence[LayerGradient]) -> Tensor:
        """Return projected gradients, (batch, dim)."""
        if self.projection is None:
            return gradients[0].inputs.new_zeros(len(gradients[0]), 0)
        return self.projection.project_gradients(gradients, self.whitening)

    def _projected(self, solved: Sequence[Tensor], nothing: Tensor) -> Tensor:
        """Return what stored rows are multiplied with, (queries, dim)."""
        if self.projection is None:
            return nothing
        if self.whitening is None:
            return self.projection.project(solved)
        pairs = zip(solved, self.whitening, strict=True)
        return self.projection.project(block.against(matrices) for matrices, block in pairs)


def inner(query: QuerySide, gradients: Sequence[LayerGradient]) -> Tensor:
    """Return the inner products of every query with every example's gradient, (queries, batch)."""
    assert query.gradients is not None
    products = [gradient.inner(matrices) for matrices, gradient in zip(query.gradients, gradients, strict=True)]
    return torch.stack(products).sum(0)


def summed(query: QuerySide, gradients: Sequence[LayerGradient]) -> Tensor:
    """Return the inner products of every query with the sum of a batch's gradients, (queries,)."""
    assert query.gradients is not None
    effects = [
        matrices.flatten(1) @ gradient.total().flatten()
        for matrices, gradient in zip(query.gradients, gradients, strict=True)
    ]
    return torch.stack(effects).sum(0)
