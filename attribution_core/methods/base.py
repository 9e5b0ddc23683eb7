"""What a feature method is: rows for training examples, a preconditioned side for queries, and inner products between them.

A method looks at one checkpoint at a time; an index averages over its checkpoints by laying their rows side by side.
With `φ_i = -∇ℓ_i`, `n` training examples and the mean curvature `H̄`, scores are `τ_i(z) = (1/n) ∇m_zᵀ (H̄ + λ)⁻¹ φ_i`: positive when having
example i raises the measurement.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.gradients import GradientCapture, LayerGradient, Pass
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
            output = batch.forward(self.module)
        self.task.check(output, batch)
        return output


@dataclass(frozen=True)
class TrainRows:
    """Encoded training examples.

    Attributes:
        rows: (batch, k).
        weights: (batch,), what a row's inner products are multiplied with.
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
    """

    output: Tensor
    rows: Tensor
    gradients: list[Tensor] | None = None

    def __getitem__(self, part: slice) -> "QuerySide":
        gradients = None if self.gradients is None else [gradient[part] for gradient in self.gradients]
        return QuerySide(self.output[part], self.rows[part], gradients)


class FeatureMethod(ABC):
    """One method on one checkpoint.

    Attributes:
        exact_rows: stored rows are the method's own definition, so nothing is re-scored.
        linear: scores are linear in the training gradient, so a group's effect needs one summed gradient only.
    """

    exact_rows: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @property
    @abstractmethod
    def dim(self) -> int:
        """Numbers per stored row."""

    @abstractmethod
    def encode_train(self, batch: Batch) -> TrainRows:
        """Return the stored side of training examples."""

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


class GradientMethod(FeatureMethod):
    """Methods that compare gradients: rows are projections of `φ_i`, queries projections of a preconditioned `∇m_z`."""

    linear = True

    def __init__(self, checkpoint: Checkpoint, projection: Projection) -> None:
        super().__init__(checkpoint)
        self.projection = projection

    @property
    def dim(self) -> int:
        """The projection's dimension."""
        return self.projection.dim

    def encode_train(self, batch: Batch) -> TrainRows:
        """Return projected `φ_i`, and `τ_i(z_i)`."""
        run = self.checkpoint.run(batch)
        loss = self.checkpoint.task.loss(run.output, batch)
        gradients = [-gradient.materialise() for gradient in run.gradients(loss, keep=True)]
        solved = self.solve(self._measured(run, batch), None)
        return TrainRows(
            rows=self.projection.project(gradients),
            weights=torch.ones_like(loss.detach()),
            self_influence=paired(solved, gradients) / self.checkpoint.num_examples,
        )

    def encode_query(self, batch: Batch) -> QuerySide:
        """Return `∇m_z` per block; rows follow when it is preconditioned."""
        run = self.checkpoint.run(batch)
        gradients = self._measured(run, batch)
        return QuerySide(run.output.detach(), gradients[0].new_zeros(len(batch), self.dim), gradients)

    def precondition(self, query: QuerySide, damping: float) -> QuerySide:
        """Return `(1/n)(H̄ + λ)⁻¹ ∇m_z`, unprojected and projected."""
        assert query.gradients is not None
        solved = [gradient / self.checkpoint.num_examples for gradient in self.solve(query.gradients, damping)]
        return QuerySide(query.output, self.projection.project(solved), solved)

    def solve(self, gradients: list[Tensor], damping: float | None) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v`; the identity here. A damping of None is the method's default."""
        return gradients

    def exact_scores(self, query: QuerySide, batch: Batch) -> Tensor:
        """Return `⟨query, φ_i⟩` without projection."""
        return -inner(query, self._loss_gradients(batch))

    def group_effect(self, query: QuerySide, batch: Batch) -> Tensor:
        """Return `⟨query, Σ φ_i⟩`."""
        assert query.gradients is not None
        effect = query.rows.new_zeros(len(query.rows))
        for matrices, gradient in zip(query.gradients, self._loss_gradients(batch), strict=True):
            effect -= matrices.flatten(1) @ gradient.total().flatten()
        return effect

    def _measured(self, run: Pass, batch: Batch) -> list[Tensor]:
        """Return `∇m` per block."""
        measured = self.checkpoint.task.measure(run.output, batch, self.checkpoint.measurement)
        return [gradient.materialise() for gradient in run.gradients(measured)]

    def _loss_gradients(self, batch: Batch) -> list[LayerGradient]:
        run = self.checkpoint.run(batch)
        return run.gradients(self.checkpoint.task.loss(run.output, batch))


def inner(query: QuerySide, gradients: Sequence[LayerGradient]) -> Tensor:
    """Return the inner products of every query with every example's gradient, (queries, batch)."""
    assert query.gradients is not None
    products = [gradient.inner(matrices) for matrices, gradient in zip(query.gradients, gradients, strict=True)]
    return torch.stack(products).sum(0)


def paired(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the inner product of each example of `first` with the same example of `second`, (batch,)."""
    return torch.stack([(a * b).flatten(1).sum(1) for a, b in zip(first, second, strict=True)]).sum(0)
