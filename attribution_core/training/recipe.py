"""How a model is trained, exactly enough to train it again; free of torch.

A recipe holds no seed: a *run* brings one, and it decides the initial weights (unless they come from a checkpoint), the order
of the examples and their augmentation. The loss is the task's, averaged over each batch.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from attribution_core.errors import InvalidInputError
from attribution_core.spec import Spec

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Sgd(Spec):
    """Stochastic gradient descent, `b ← μ b + g; θ ← θ − η b`; with Nesterov's momentum `θ ← θ − η (g + μ b)`."""

    type: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="μ; 0 is plain descent.")
    nesterov: bool = Field(default=False, description="Look ahead along the momentum (Sutskever et al. 2013).")

    @model_validator(mode="after")
    def _momentum_for_nesterov(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class _AdaptiveMoments(Spec):
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="Decay of the mean and of the mean square of gradients."
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="Added to the root of the mean square.")


class Adam(_AdaptiveMoments):
    """Adam (Kingma & Ba 2015); weight decay is coupled: a penalty whose gradient is scaled like the loss's."""

    type: Literal["adam"] = "adam"


class AdamW(_AdaptiveMoments):
    """AdamW (Loshchilov & Hutter 2019); weight decay is decoupled: `θ ← (1 − η λ) θ` before each step."""

    type: Literal["adamw"] = "adamw"


class _Warmed(Spec):
    """A schedule that may begin with a linear rise; its own course spans the steps after it."""

    warmup_steps: int | None = Field(default=None, ge=0, le=10**9, description="Steps of linear rise at the start.")
    warmup_fraction: Share | None = Field(default=None, description="The rise, as a share of all steps instead.")
    warmup_start: Share = Field(default=0.0, description="Share of the learning rate at which the rise begins.")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError("give warmup_steps or warmup_fraction, not both")
        return self

    def factor(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """Return the share of the learning rate that step `step` of `steps` (from 0) takes."""
        warmup = round((self.warmup_fraction or 0) * steps) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return self.warmup_start + (1 - self.warmup_start) * step / warmup
        return self._course((step - warmup) / max(1, steps - warmup), step // steps_per_epoch)

    def _course(self, progress: float, epoch: int) -> float:
        """Return the factor after the rise, of the share of its steps that is done and the epoch of the whole training."""
        raise NotImplementedError


class Constant(_Warmed):
    """The learning rate as it is."""

    type: Literal["constant"] = "constant"

    def _course(self, progress: float, epoch: int) -> float:
        return 1.0


class StepDecay(_Warmed):
    """The learning rate times `gamma` after every `every` epochs, counted from the start of training."""

    type: Literal["step"] = "step"
    every: int = Field(ge=1, le=1_000_000, description="Epochs between two falls.")
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(default=0.1, description="Factor of each fall.")

    def _course(self, progress: float, epoch: int) -> float:
        return float(self.gamma ** (epoch // self.every))


class Cosine(_Warmed):
    """Half a cosine from the learning rate to `final` of it (Loshchilov & Hutter 2017, without restarts)."""

    type: Literal["cosine"] = "cosine"
    final: Share = Field(default=0.0, description="Share of the learning rate after the last step.")

    def _course(self, progress: float, epoch: int) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Linear(_Warmed):
    """A straight line from the learning rate to `final` of it."""

    type: Literal["linear"] = "linear"
    final: Share = Field(default=0.0, description="Share of the learning rate after the last step.")

    def _course(self, progress: float, epoch: int) -> float:
        return 1 - (1 - self.final) * progress


class OneCycle(Spec):
    """One rise to the learning rate and one fall far below where it began (Smith & Topin 2018; torch's OneCycleLR in two phases)."""

    type: Literal["one_cycle"] = "one_cycle"
    rise: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.3, description="Share of the steps that rise.")
    initial_divisor: float = Field(default=25.0, ge=1, le=1e9, description="The first rate is the peak over this.")
    final_divisor: float = Field(default=1e4, ge=1, le=1e12, description="The last rate is the first over this.")
    anneal: Literal["cosine", "linear"] = Field(default="cosine", description="Shape of both phases.")

    def factor(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """Return the share of the learning rate that step `step` of `steps` (from 0) takes."""
        peak = max(0.0, self.rise * steps - 1)
        first = 1 / self.initial_divisor
        if step < peak:
            return self._between(first, 1.0, step / peak)
        return self._between(1.0, first / self.final_divisor, (step - peak) / max(1.0, steps - 1 - peak))

    def _between(self, start: float, end: float, progress: float) -> float:
        done = progress if self.anneal == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return start + (end - start) * done


class SeededInitialisation(Spec):
    """The architecture's own random weights, drawn with the run's seed."""

    type: Literal["seed"] = "seed"


class CheckpointInitialisation(Spec):
    """The weights of a checkpoint: fine-tuning. The run's seed then decides order and augmentation alone."""

    type: Literal["checkpoint"] = "checkpoint"
    checkpoint: str = Field(min_length=1, max_length=128, description="Id of a checkpoint of this architecture.")


OptimizerSpec = Annotated[Sgd | Adam | AdamW, Field(discriminator="type")]
ScheduleSpec = Annotated[Constant | StepDecay | Cosine | Linear | OneCycle, Field(discriminator="type")]
InitialisationSpec = Annotated[SeededInitialisation | CheckpointInitialisation, Field(discriminator="type")]


class Recipe(Spec):
    """How a model is trained: the same recipe, data and seed give the same weights, to the bit on one device."""

    optimizer: OptimizerSpec = Field(description="What turns gradients into steps.")
    learning_rate: float = Field(gt=0, le=1e6, description="η at the schedule's peak.")
    schedule: ScheduleSpec = Field(default=Constant(), description="The learning rate over the steps.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="λ, of every parameter. Coupled for sgd and adam (λθ is added to the gradient, after clipping), decoupled for adamw.",
    )
    epochs: int = Field(ge=1, le=1_000_000, description="Passes over the training set.")
    batch_size: int = Field(ge=1, le=1_000_000, description="Examples per step; the loss is their mean.")
    drop_last: bool = Field(default=False, description="Leave out an epoch's last batch where it is not full.")
    shuffle: bool = Field(default=True, description="A new order each epoch, from the run's seed; else by row.")
    initialisation: InitialisationSpec = Field(default=SeededInitialisation(), description="Where weights start.")
    gradient_clip: float | None = Field(
        default=None,
        gt=0,
        le=1e12,
        description="Largest norm of the gradient of all parameters together; longer ones are scaled down to it.",
    )
    augmentation: Literal["none", "horizontal_flip", "shift"] = Field(
        default="none",
        description="Of images; random by the run's seed, the step and the row alone. `horizontal_flip` mirrors half of them, "
        "`shift` moves each by up to `max_shift` pixels in both directions and fills with zeros.",
    )
    max_shift: int = Field(default=2, ge=1, le=1024, description="Pixels, for augmentation `shift`.")

    def steps_per_epoch(self, examples: int) -> int:
        """Return how many batches a pass over so many examples takes."""
        return examples // self.batch_size if self.drop_last else -(-examples // self.batch_size)

    def num_steps(self, examples: int) -> int:
        """Return how many steps training on so many examples takes."""
        return self.epochs * self.steps_per_epoch(examples)

    def check_steps(self, examples: int) -> None:
        """Refuse to train on so few examples that they make no batch, or fewer steps than the warm-up has.

        Raises:
            InvalidInputError: naming the batch size or the schedule.
        """
        steps = self.num_steps(examples)
        if not steps:
            raise InvalidInputError(f"{examples} examples make no batch of {self.batch_size}", "/recipe/batch_size")
        warmup = self.schedule.warmup_steps if isinstance(self.schedule, _Warmed) else None
        if warmup is not None and warmup > steps:
            raise InvalidInputError(
                f"the warm-up of {warmup} steps is longer than the training of {steps}", "/recipe/schedule"
            )

    def learning_rates(self, examples: int) -> Iterator[float]:
        """Yield the learning rate of every step of training on so many examples; there may be very many."""
        each, steps = self.steps_per_epoch(examples), self.num_steps(examples)
        return (self.learning_rate * self.schedule.factor(step, steps, each) for step in range(steps))
