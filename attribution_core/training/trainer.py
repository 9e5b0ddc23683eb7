"""Training by a recipe: many runs at once as one batched program over stacked parameters, each step a pure function.

Two meanings of leaving examples out: under `resample` a run's training set is the examples it keeps, with batches, steps and schedule of
their own; under `mask` it takes every step of its seed's training on everything, and the loss of a left-out example weighs zero in a
mean that still divides by the whole batch. With nothing left out the two are the same program. A run that keeps nothing takes no step under
`resample`: it is the untrained model.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.progress import NoProgress, Progress
from attribution_core.tasks import build_task
from attribution_core.training.augmentation import augmented
from attribution_core.training.data import TrainingData
from attribution_core.training.network import Network, stacked_batches
from attribution_core.training.optimizers import Tensors, build_optimizer, clipped
from attribution_core.training.spec import Semantics, TrainSpec

# What a processor caches, about: more models at once save no more overhead and read from memory (1.6 times slower for a small CNN).
MEMORY_BUDGET = 32 << 20
_TIMED_STEPS = 3


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        kept: which examples are trained on, (n,) bool; none of those that the spec leaves out.
        seed: of initial weights, order and augmentation.
    """

    kept: np.ndarray
    seed: int


@dataclass(frozen=True)
class Step:
    """What one step of a run does.

    Attributes:
        number: of the step, from 0.
        epoch: from 0.
        rows: of the batch, (batch,) int64.
        weights: of the rows' losses, (batch,) float32; the step descends `Σ w_i ℓ_i / batch`.
        learning_rate: η of this step.
    """

    number: int
    epoch: int
    rows: np.ndarray
    weights: np.ndarray
    learning_rate: float


@dataclass(frozen=True)
class Snapshot:
    """Stacked runs in the middle of training.

    Attributes:
        runs: numbers of the runs in the call, (models,).
        step: steps done.
        epoch: epochs begun.
        learning_rate: of the last step done.
        parameters: (models, *shape) by name.
    """

    runs: tuple[int, ...]
    step: int
    epoch: int
    learning_rate: float
    parameters: Tensors


@dataclass(frozen=True)
class Trained:
    """Finished runs, in the order they were asked for.

    Attributes:
        parameters: (models, *shape) by name.
        diverged: runs that met a loss or end with parameters that are not finite, (models,) bool.
    """

    parameters: Tensors
    diverged: np.ndarray


class Trainer:
    """Trains one spec's model. Results are the same to the bit for the same call on one device and number of threads.

    Raises:
        InvalidInputError: if the data does not fit the model, or training it would be random.
        FingerprintMismatchError: if data or initial weights are not those named.
    """

    def __init__(self, spec: TrainSpec, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.spec, self.recipe, self.device, self.dtype = spec, spec.recipe, device, dtype
        self.network = Network(spec.architecture, build_task(spec.task), device, dtype)
        self.data = TrainingData.of(spec, device, dtype)
        self.optimizer = build_optimizer(spec.recipe)
        if spec.initial is not None:
            spec.initial.verify()
        first = augmented(self.data.batch(spec.training_rows[:1]), self.recipe, 0, 0)
        self.data.check(self.network.task, self.network.probe(first))

    def steps(self, run: Run, semantics: Semantics) -> Iterator[Step]:
        """Yield every step of a run, one at a time as there may be very many; a function of the recipe, the run and the semantics alone.

        Raises:
            InvalidInputError: if the run keeps examples that the spec leaves out, or too few for a single step, or the warm-up never ends.
        """
        if run.kept[self.spec.left_out].any():
            raise InvalidInputError("a run keeps examples that are left out of every training")
        own = np.flatnonzero(run.kept) if semantics == "resample" else self.spec.training_rows
        self._check_steps(len(own))
        return self._generated(run, own)

    def plan(self, run: Run, semantics: Semantics) -> list[Step]:
        """Return every step of a run, for those who go through them more than once."""
        return list(self.steps(run, semantics))

    def num_steps(self, run: Run, semantics: Semantics) -> int:
        """Return how many steps a run takes.

        Raises:
            InvalidInputError: if the run keeps too few examples for a single step, or the warm-up never ends.
        """
        examples = self._examples(run, semantics)
        self._check_steps(examples)
        return self.recipe.num_steps(examples)

    def step_batch(self, run: Run, step: Step) -> Batch:
        """Return the examples of one step as the run sees them, augmented."""
        return augmented(self.data.batch(step.rows), self.recipe, run.seed, step.number)

    def initial(self, run: Run) -> Tensors:
        """Return a run's parameters before its first step."""
        return self.network.initial(run.seed, self.spec.initial)

    def advance(self, parameters: Tensors, state: Tensors, gradients: Tensors, step: Step) -> tuple[Tensors, Tensors]:
        """Return one model's parameters and optimizer state after a step with the gradients of its loss: clipped, then applied.

        A pure function of its tensors, differentiable in all of them.
        """
        if self.recipe.gradient_clip is not None:
            gradients = clipped(gradients, self.recipe.gradient_clip)
        return self.optimizer.update(parameters, state, gradients, step.learning_rate, step.number)

    def train(
        self,
        runs: Sequence[Run],
        semantics: Semantics = "resample",
        progress: Progress | None = None,
        save: Callable[[Snapshot], None] | None = None,
        save_every: int | None = None,
        budget: int = MEMORY_BUDGET,
    ) -> Trained:
        """Train runs and return them in order.

        Args:
            runs: what to train.
            semantics: what leaving out means.
            progress: is told of every step of every model.
            save: is called with each part of the runs after every `save_every` steps and after the last one.
            save_every: only after the last step if None.
            budget: bytes that the models trained at once may take.

        Raises:
            InvalidInputError: if a run has no step to take.
            Cancelled: from progress.
        """
        parts: dict[int, tuple[Tensors, np.ndarray]] = {}
        for numbers in self._parts(runs, semantics, budget):
            work = _Part(self, [runs[number] for number in numbers], semantics, tuple(numbers))
            parameters, diverged = work.run(progress or NoProgress(), save, save_every)
            for place, number in enumerate(numbers):
                parts[number] = {name: value[place] for name, value in parameters.items()}, diverged[place]
        ordered = [parts[number] for number in range(len(runs))]
        stacked = {name: torch.stack([one[name] for one, _ in ordered]) for name in ordered[0][0]}
        return Trained(stacked, np.array([diverged for _, diverged in ordered], bool))

    def models_at_once(self, budget: int = MEMORY_BUDGET) -> int:
        """Return how many models train at once within so many bytes; one at least, and one where the architecture allows no more."""
        return max(1, budget // self.peak_bytes()) if self.network.vectorises else 1

    def peak_bytes(self) -> int:
        """Return an estimate of one model's memory in training: old and new weights and state, gradients, activations twice.

        Counted from tensors, not measured: every machine comes to the same number, and so to the same batched programs.
        """
        tensors = 5 + 2 * len(self.optimizer.moments)
        weights = tensors * self.network.num_parameters * self.dtype.itemsize
        example = self.data.batch(self.spec.training_rows[:1])
        batch = min(self.recipe.batch_size, self.spec.num_training)
        return weights + 2 * batch * (example.inputs.nbytes + self.network.activation_bytes(example))

    def estimate_seconds(
        self, runs: Sequence[Run], semantics: Semantics = "resample", budget: int = MEMORY_BUDGET
    ) -> float:
        """Return about how long training takes, from the wall time of a few steps of its first part."""
        parts = list(self._parts(runs, semantics, budget))
        first = _Part(self, [runs[number] for number in parts[0]], semantics, tuple(parts[0]))
        seconds = first.seconds_per_step(_TIMED_STEPS) / len(parts[0])
        return seconds * sum(len(part) * self.num_steps(runs[part[0]], semantics) for part in parts)

    def _generated(self, run: Run, own: np.ndarray) -> Iterator[Step]:
        """Yield the steps over a run's own rows: every epoch in an order of its own."""
        rates, size = self.recipe.learning_rates(len(own)), self.recipe.batch_size
        each = self.recipe.steps_per_epoch(len(own))
        generator = torch.Generator().manual_seed(run.seed)
        for epoch in range(self.recipe.epochs):
            order = (
                torch.randperm(len(own), generator=generator).numpy() if self.recipe.shuffle else np.arange(len(own))
            )
            for place in range(each):
                rows = own[order[place * size : (place + 1) * size]]
                yield Step(epoch * each + place, epoch, rows, run.kept[rows].astype(np.float32), next(rates))

    def _check_steps(self, examples: int) -> None:
        if examples:
            self.recipe.check_steps(examples)

    def _examples(self, run: Run, semantics: Semantics) -> int:
        return int(run.kept.sum()) if semantics == "resample" else self.spec.num_training

    def _parts(self, runs: Sequence[Run], semantics: Semantics, budget: int) -> Iterator[list[int]]:
        """Yield numbers of runs that train together: as many steps each, as many at once as memory allows."""
        for number, run in enumerate(runs):
            if run.kept.shape != (len(self.data),):
                raise InvalidInputError(f"run {number} is of {len(run.kept)} examples, the data of {len(self.data)}")

        def examples(number: int) -> int:
            return self._examples(runs[number], semantics)

        at_once = self.models_at_once(budget)
        for _, group in groupby(sorted(range(len(runs)), key=examples), examples):
            numbers = list(group)
            for start in range(0, len(numbers), at_once):
                yield numbers[start : start + at_once]


class _Part:
    """Runs that train together, step by step."""

    def __init__(self, trainer: Trainer, runs: Sequence[Run], semantics: Semantics, numbers: tuple[int, ...]) -> None:
        self.trainer, self.runs, self.numbers = trainer, runs, numbers
        self.total = trainer.num_steps(runs[0], semantics)
        self.steps = zip(*(trainer.steps(run, semantics) for run in runs), strict=True)
        starts = [trainer.initial(run) for run in runs]
        self.parameters = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
        self.state = trainer.optimizer.init_state(self.parameters)
        self.finite = torch.ones(len(runs), dtype=torch.bool, device=trainer.device)

    def run(
        self, progress: Progress, save: Callable[[Snapshot], None] | None, save_every: int | None
    ) -> tuple[Tensors, np.ndarray]:
        """Take every step; return the parameters and which runs diverged."""
        for steps in self.steps:
            self._step(steps)
            done = steps[0].number + 1
            if save is not None and (done == self.total or (save_every and done % save_every == 0)):
                save(Snapshot(self.numbers, done, steps[0].epoch + 1, steps[0].learning_rate, self.parameters))
            progress.advance(len(self.runs))
        for value in self.parameters.values():
            self.finite &= value.isfinite().flatten(1).all(1)
        return self.parameters, ~self.finite.cpu().numpy()

    def seconds_per_step(self, steps: int) -> float:
        """Return the wall time of a step, after a first one that warms up."""
        times = [time.perf_counter()]
        for taken in islice(self.steps, steps + 1):
            self._step(taken)
            times.append(time.perf_counter())
        return float(np.median(np.diff(times)[1:] if len(times) > 2 else np.diff(times)))

    def _step(self, steps: tuple[Step, ...]) -> None:
        trainer = self.trainer
        gradients, losses = trainer.network.gradients(self.parameters, self._batch(steps), self._weights(steps))
        self.finite &= losses.isfinite()
        clip = trainer.recipe.gradient_clip
        if clip is not None:
            gradients = vmap(lambda one: clipped(one, clip))(gradients)
        self.parameters, self.state = trainer.optimizer.update(
            self.parameters, self.state, gradients, steps[0].learning_rate, steps[0].number
        )

    def _batch(self, steps: tuple[Step, ...]) -> Batch:
        """Return fields (models, batch, …)."""
        trainer = self.trainer
        if trainer.recipe.augmentation == "none":
            return trainer.data.batch(np.stack([step.rows for step in steps]))
        batches = [trainer.step_batch(run, step) for run, step in zip(self.runs, steps, strict=True)]
        return stacked_batches(batches)

    def _weights(self, steps: tuple[Step, ...]) -> Tensor:
        weights = torch.from_numpy(np.stack([step.weights for step in steps]))
        return weights.to(self.trainer.device, self.trainer.dtype)
