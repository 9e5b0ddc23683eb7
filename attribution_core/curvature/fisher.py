"""What one forward pass over training examples gives: gradients of the measurement and the loss, and draws of the Fisher matrix."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from attribution_core.curvature.ekfac import Draws
from attribution_core.data.batch import Batch
from attribution_core.gradients import LayerGradient, Pass
from attribution_core.method_spec import FisherSampling
from attribution_core.tasks import FisherKind, Task

MAX_ENUMERATED_LABELS = 32


@dataclass(frozen=True)
class Fisher:
    """How pseudo-gradients `g` with `Σ g gᵀ` = the model's Fisher matrix are drawn.

    Attributes:
        kind: labels enumerated, sampled or the data's own; `auto` enumerates where labels are few.
        samples: labels drawn per example.
    """

    kind: str
    samples: int
    seed: int

    @classmethod
    def of(cls, method: FisherSampling) -> "Fisher":
        """Return what a method asks for."""
        return cls(method.fisher, method.samples, method.seed)

    def draws(self, run: Pass, task: Task, batch: Batch) -> Draws:
        """Return the pseudo-gradients of a batch per label, with padded positions' inputs set to zero."""
        kind: FisherKind = self._kind(task.exact_labels(run.output))
        losses = task.pseudo_losses(run.output, batch, kind, self.seed, self.samples)
        return [_without_padding(run.gradients(loss, keep=True), batch) for loss in losses]

    def _kind(self, labels: int | None) -> FisherKind:
        match self.kind:
            case "exact" | "sampled" | "empirical" as kind:
                return kind
        return "exact" if labels is not None and labels <= MAX_ENUMERATED_LABELS else "sampled"


@dataclass(frozen=True)
class Observed:
    """Gradients of a batch of training examples.

    Attributes:
        batch: the examples.
        measured: `∇m`, one entry per block.
        losses: `∇ℓ`; None where it is the measured gradient times the slope.
        slope: `∂ℓ/∂m` (batch,), else None.
        draws: pseudo-gradients, where asked for.
    """

    batch: Batch
    measured: Sequence[LayerGradient]
    losses: Sequence[LayerGradient] | None
    slope: Tensor | None = None
    draws: Draws = ()

    @property
    def direction(self) -> Sequence[LayerGradient]:
        """What each example's `φ` is a multiple of: whatever is linear in `φ` can scale its results instead of the gradients."""
        return self.measured if self.losses is None else self.losses

    @property
    def multiple(self) -> Tensor:
        """`φ` divided by `direction`, (batch,)."""
        return self.measured[0].inputs.new_full((len(self),), -1) if self.slope is None else -self.slope

    @cached_property
    def training(self) -> list[LayerGradient]:
        """`φ = -∇ℓ`, made when it is asked for: until then it would double what is kept."""
        return scaled(self.direction, self.multiple)

    def compact(self) -> "Observed":
        """Return the same with whole gradients where these are smaller than their factors."""
        losses = None if self.losses is None else compact(self.losses)
        return Observed(self.batch, compact(self.measured), losses, self.slope, [compact(draw) for draw in self.draws])

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, what is shared counted once."""
        seen: dict[int, int] = {}
        for gradient in self._all():
            for tensor in (gradient.inputs, gradient.outputs):
                seen[tensor.data_ptr()] = max(seen.get(tensor.data_ptr(), 0), tensor.nbytes)
        return sum(seen.values())

    def _all(self) -> Iterator[LayerGradient]:
        yield from self.measured
        yield from self.losses or ()
        for draw in self.draws:
            yield from draw


def observe(run: Pass, task: Task, batch: Batch, measurement: str, fisher: Fisher | None) -> Observed:
    """Differentiate one forward pass; a measurement that decides the loss needs one backward pass for both."""
    draws = [] if fisher is None else fisher.draws(run, task, batch)
    slope = task.slope(run.output, batch, measurement)
    measured = run.gradients(task.measure(run.output, batch, measurement), keep=slope is None)
    if slope is None:
        return Observed(batch, measured, run.gradients(task.loss(run.output, batch)), None, draws)
    return Observed(batch, measured, None, slope.detach(), draws)


def compact(gradients: Sequence[LayerGradient]) -> list[LayerGradient]:
    """Return each block's gradients whole where that takes fewer numbers than their factors."""
    return [gradient.compact() for gradient in gradients]


def scaled(gradients: Sequence[LayerGradient], weights: Tensor) -> list[LayerGradient]:
    """Return each example's gradient times its weight (batch,)."""
    return [gradient.scaled(weights) for gradient in gradients]


def _without_padding(gradients: list[LayerGradient], batch: Batch) -> list[LayerGradient]:
    """Set the inputs of padded positions to zero; their output gradients are zero already, but `A` does not look at those.

    A weight used several times has the positions of one use after those of the other.
    """
    if batch.mask is None or bool(batch.mask.all()):
        return gradients
    tokens = batch.mask.shape[1]
    masked = []
    for gradient in gradients:
        uses, rest = divmod(gradient.inputs.shape[2], tokens)
        real = batch.mask.repeat(1, uses)[:, None, :, None]
        masked.append(gradient if rest or not uses else replace(gradient, inputs=gradient.inputs * real))
    return masked
