"""What one forward pass over training examples gives: gradients of the measurement and the loss, and draws of the Fisher matrix."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.draws import Draws, compact
from attribution_core.data.batch import Batch
from attribution_core.gradients import LayerGradient, Pass
from attribution_core.method_spec import FisherSampling
from attribution_core.tasks import FisherKind, Task

MAX_ENUMERATED_LABELS = 32
# Of the trace of the outputs' Fisher matrix, what the directions that are not drawn have at most.
LEFT_OUT = 0.01
# A power below 0 of less would overflow.
_LEAST_SHORTFALL = 1e-30
# Squared lengths that differ by less, as a share, differ by rounding.
_SAME = 1e-4

Run = Callable[[Batch], Pass]


@dataclass(frozen=True)
class Fisher:
    """How pseudo-gradients `g` with `Σ g gᵀ` = the model's Fisher matrix are drawn.

    Attributes:
        kind: labels enumerated, sampled or the data's own; `auto` enumerates where labels are few, or takes directions that matter.
        samples: labels drawn per example.
        least: squared length from which a direction of an example's outputs (`Task.directions`) matters; 0 enumerates labels.
    """

    kind: str
    samples: int
    seed: int
    least: float = 0.0

    @classmethod
    def of(cls, method: FisherSampling) -> "Fisher":
        """Return what a method asks for."""
        return cls(method.fisher, method.samples, method.seed)

    def shortened(self, task: Task, outputs: Tensor) -> "Fisher":
        """Return the same with only the directions that matter, as told from some examples' outputs, where these are fewer than labels.

        Source: docs/decisions/0016-directions-that-matter.md.
        """
        directions = self._directions(task, outputs)
        if directions is None:
            return self
        lengths = _lengths(directions).flatten().sort(descending=True).values
        left = lengths.sum() - lengths.cumsum(0)
        shortest = lengths[(left > LEFT_OUT * lengths.sum()).sum()]
        # Directions of one length (of equal examples, say) matter together.
        smaller = lengths[lengths < (1 - _SAME) * shortest]
        kept = len(lengths) - len(smaller)
        if len(smaller) == 0 or kept >= len(outputs) * directions.shape[2] / 2:  # labels need no second pass
            return self
        # Between two lengths, so that no rounding decides whether a direction matters.
        return replace(self, least=float((lengths[kept - 1] + smaller[0]) / 2))

    def draws(self, run: Pass, task: Task, batch: Batch, again: Run | None = None) -> Draws:
        """Return the pseudo-gradients of a batch, with padded positions' inputs set to zero.

        Args:
            run: the model's pass over the batch.
            task: of the model.
            batch: the examples.
            again: runs the model on some of the examples; without it labels are enumerated.
        """
        directions = self._directions(task, run.output) if self.least and again is not None else None
        if directions is not None and again is not None:
            return replace(self._along(directions, run, batch, again), shortfall=_shortfall(run, task, batch))
        kind = self._kind(task.exact_labels(run.output))
        losses = task.pseudo_losses(run.output, batch, kind, self.seed, self.samples)
        parts = [run.gradients(loss, keep=True, mask=batch.mask) for loss in losses]
        return Draws(parts, shortfall=_shortfall(run, task, batch))

    def matters(self, task: Task, outputs: Tensor) -> Tensor:
        """Return which examples have a direction that matters, (batch,)."""
        directions = self._directions(task, outputs) if self.least else None
        if directions is None:
            return torch.ones(len(outputs), dtype=torch.bool, device=outputs.device)
        return (_lengths(directions) > self.least).any(1)

    def _along(self, directions: Tensor, run: Pass, batch: Batch, again: Run) -> Draws:
        """Return the pseudo-gradients along the directions that matter, which few examples have, by running only these once more."""
        owners, places = (_lengths(directions) > self.least).nonzero(as_tuple=True)
        parts = []
        for few in torch.arange(len(owners), device=owners.device).split(len(batch)) if len(owners) else ():
            examples = batch[owners[few]]
            ran = again(examples)
            along = (ran.output * directions[owners[few], places[few]]).sum(1)
            parts.append(ran.gradients(along, mask=examples.mask))
        return Draws(parts, run.inputs(batch.mask))

    def exact(self, task: Task, outputs: Tensor) -> bool:
        """Return whether `Σ g gᵀ` is the model's Fisher matrix itself, as told from some examples' outputs."""
        return self._kind(task.exact_labels(outputs)) == "exact"

    def chooses(self, task: Task, outputs: Tensor) -> bool:
        """Return whether labels are enumerated, or fewer directions taken, as is better."""
        return self.kind == "auto" and self.exact(task, outputs)

    def _directions(self, task: Task, outputs: Tensor) -> Tensor | None:
        return task.directions(outputs) if self.chooses(task, outputs) else None

    def _kind(self, labels: int | None) -> FisherKind:
        match self.kind:
            case "exact" | "sampled" | "empirical" as kind:
                return kind
        return "exact" if labels is not None and labels <= MAX_ENUMERATED_LABELS else "sampled"


def _lengths(directions: Tensor) -> Tensor:
    """Return the squared lengths of (batch, count, outputs)."""
    return directions.square().sum(2)


@dataclass(frozen=True)
class Tempering:
    """What examples count for beyond their loss gradient, which is in proportion to `1 - p` of their target: `(1 - p)^power / scale` in place of it.

    Source: docs/decisions/0023-tempered-residuals.md.

    Attributes:
        power: 1 for the derivative.
        scale: by which powers have the mean over the training set that the residuals themselves have.
    """

    power: float = 1.0
    scale: float = 1.0

    @classmethod
    def of(cls, power: float, sums: np.ndarray) -> "Tempering":
        """Return it with the scale that the training set's sums, or means, of `1 - p` and `(1 - p)^power` ask for."""
        plain, tempered = (float(each) for each in sums)
        return cls(power, tempered / plain) if plain else cls()

    def weights(self, shortfall: Tensor) -> Tensor:
        """Return what gradients are multiplied with, (batch,); signs stay, and so does what is 0."""
        return shortfall.clamp(min=_LEAST_SHORTFALL) ** (self.power - 1) / self.scale


class ShortfallSums:
    """Sums over examples of `1 - p` and `(1 - p)^power`, (2,) float64."""

    NAME = "shortfalls"

    def __init__(self, power: float) -> None:
        self.power = power
        self.values = np.zeros(2)

    def add(self, draws: Draws) -> None:
        """Add a batch of a task that has `1 - p`."""
        assert draws.shortfall is not None
        self.add_shortfalls(draws.shortfall)

    def add_shortfalls(self, shortfalls: Tensor) -> None:
        """Add the `1 - p` of some examples, (examples,)."""
        each = shortfalls.double()
        self.values += [float(each.sum()), float(each.pow(self.power).sum())]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the sums by name."""
        return {self.NAME: self.values}


@dataclass(frozen=True)
class Observed:
    """Gradients of a batch of training examples.

    Attributes:
        batch: the examples.
        measured: `∇m`, one entry per block.
        losses: `∇ℓ`; None where it is the measured gradient times the slope.
        slope: `∂ℓ/∂m` (batch,), else None.
        draws: pseudo-gradients, where asked for.
        shortfall: `1 - p` of each example's target (batch,), where the task has it.
        weights: what each example counts beyond its loss gradient, (batch,); 1 where None.
    """

    batch: Batch
    measured: Sequence[LayerGradient]
    losses: Sequence[LayerGradient] | None
    slope: Tensor | None = None
    draws: Draws = field(default_factory=Draws)
    shortfall: Tensor | None = None
    weights: Tensor | None = None

    @property
    def direction(self) -> Sequence[LayerGradient]:
        """What each example's `φ` is a multiple of: whatever is linear in `φ` can scale its results instead of the gradients."""
        return self.measured if self.losses is None else self.losses

    @property
    def multiple(self) -> Tensor:
        """`φ` divided by `direction`, (batch,)."""
        each = self.measured[0].inputs.new_full((len(self),), -1) if self.slope is None else -self.slope
        return each if self.weights is None else each * self.weights

    def tempered(self, tempering: Tempering) -> "Observed":
        """Return the same with each `φ` weighted, where the task has a `1 - p`."""
        if self.shortfall is None or tempering.power == 1:
            return self
        return replace(self, weights=tempering.weights(self.shortfall))

    @cached_property
    def training(self) -> list[LayerGradient]:
        """`φ = -∇ℓ`, weighted, made when it is asked for: until then it would double what is kept."""
        return scaled(self.direction, self.multiple)

    def compact(self) -> "Observed":
        """Return the same with whole gradients where these are smaller than their factors."""
        losses = None if self.losses is None else compact(self.losses)
        return replace(self, measured=compact(self.measured), losses=losses, draws=self.draws.compact())

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, what is shared counted once."""
        seen: dict[int, int] = {}
        for gradient in self.gradients():
            for tensor in (gradient.inputs, gradient.outputs):
                seen[tensor.data_ptr()] = max(seen.get(tensor.data_ptr(), 0), tensor.nbytes)
        return sum(seen.values())

    def gradients(self) -> Iterator[LayerGradient]:
        """Yield all gradients, block by block."""
        yield from self.measured
        yield from self.losses or ()
        for draw in self.draws:
            yield from draw


def observe(
    run: Pass, task: Task, batch: Batch, measurement: str, fisher: Fisher | None, again: Run | None = None
) -> Observed:
    """Differentiate one forward pass; a measurement that decides the loss needs one backward pass for both."""
    draws = Draws() if fisher is None else fisher.draws(run, task, batch, again)
    slope, shortfall = task.slope(run.output, batch, measurement), _shortfall(run, task, batch)
    measured = run.gradients(task.measure(run.output, batch, measurement), keep=slope is None)
    if slope is None:
        return Observed(batch, measured, run.gradients(task.loss(run.output, batch)), None, draws, shortfall)
    return Observed(batch, measured, None, slope.detach(), draws, shortfall)


def _shortfall(run: Pass, task: Task, batch: Batch) -> Tensor | None:
    shortfall = task.shortfall(run.output, batch)
    return None if shortfall is None else shortfall.detach()


def scaled(gradients: Sequence[LayerGradient], weights: Tensor) -> list[LayerGradient]:
    """Return each example's gradient times its weight (batch,)."""
    return [gradient.scaled(weights) for gradient in gradients]
