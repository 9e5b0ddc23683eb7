"""New weights by fine-tuning: to predicted outputs (datamodel matching), and the two baselines that predict nothing."""

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.func import grad

from attribution_core.data.batch import Batch
from attribution_core.progress import Progress
from attribution_core.training.optimizers import Tensors
from attribution_core.training.spec import TrainSpec
from attribution_core.training.trainer import Run, Trainer
from attribution_core.unlearning.base import Subject, Unlearned, Unlearner, spread
from attribution_core.unlearning.spec import RETAINED_PER_FORGOTTEN, DatamodelMatching, FineTuning


class FineTuner(Unlearner):
    """Descends an objective of some training examples from a checkpoint's weights on.

    Raises:
        InvalidInputError: if training the architecture would be random, or mix examples.
    """

    def __init__(self, subject: Subject, spec: FineTuning) -> None:
        super().__init__(subject)
        self.spec = spec

    @property
    @abstractmethod
    def rows(self) -> np.ndarray:
        """The training examples whose objective is descended, in order."""

    @abstractmethod
    def objective(self, output: Tensor, batch: Batch, number: int) -> Tensor:
        """Return what a step of one checkpoint descends."""

    @property
    def units(self) -> int:
        """Steps."""
        return self.spec.epochs * self.spec.recipe().steps_per_epoch(len(self.rows))

    def unlearn(self, number: int, progress: Progress) -> Unlearned:
        """Return the weights after the last step."""
        trainer, run = self._trainer(), Run(self._kept(), self.spec.seed)
        parameters = self.original(number)
        state = trainer.optimizer.init_state(parameters)
        last = torch.zeros(())
        for step in trainer.steps(run, "resample"):
            batch = trainer.step_batch(run, step)

            def value(parameters: Tensors, batch: Batch = batch) -> tuple[Tensor, Tensor]:
                found = self.objective(trainer.network.output(parameters, batch), batch, number)
                return found, found

            gradients, last = grad(value, has_aux=True)(parameters)
            parameters, state = trainer.advance(parameters, state, gradients, step)
            progress.advance(1)
        return Unlearned(parameters, {"objective": float(last)})

    def _trainer(self) -> Trainer:
        fit = self.subject.spec.fit
        chosen = {"architecture", "task", "tokenizer", "tokenizer_path", "dataset"}
        spec = TrainSpec(recipe=self.spec.recipe(), **{name: getattr(fit, name) for name in chosen})
        return Trainer(spec, self.subject.device)

    def _kept(self) -> np.ndarray:
        kept = np.zeros(self.subject.spec.fit.dataset.num_examples, bool)
        kept[self.rows] = True
        return kept


class GradientAscentUnlearner(FineTuner):
    """Ascends the mean loss of the forget set."""

    @property
    def rows(self) -> np.ndarray:
        """The forget set."""
        return self.subject.forget

    def objective(self, output: Tensor, batch: Batch, number: int) -> Tensor:
        """Return minus the mean loss."""
        return -self.subject.context.task.loss(output, batch).mean()


class FineTuneUnlearner(FineTuner):
    """Descends the mean loss of the examples that stay."""

    @property
    def rows(self) -> np.ndarray:
        """The examples that stay."""
        return self.subject.retain

    def objective(self, output: Tensor, batch: Batch, number: int) -> Tensor:
        """Return the mean loss."""
        return self.subject.context.task.loss(output, batch).mean()


class DatamodelMatcher(FineTuner):
    """Descends the mean squared distance to predicted outputs `m_z(θ) - Σ_F τ_i(z)`, for z in the forget set and beyond.

    Each checkpoint starts from outputs of its own; the predicted change is the index's. Where the index measures logits, it is asked for
    every class in turn, and the distance is over classes as well.

    Source: Georgiev et al. 2024, Attribute-to-Delete: Machine Unlearning via Datamodel Matching.
    """

    spec: DatamodelMatching

    def __init__(self, subject: Subject, spec: DatamodelMatching) -> None:
        super().__init__(subject, spec)
        self._changes: Tensor | None = None
        self._targets: dict[int, Tensor] = {}
        self._sorted = torch.from_numpy(self.rows).to(subject.device)

    @cached_property
    def rows(self) -> np.ndarray:
        """The forget set, and evenly spread examples that stay."""
        forget = self.subject.forget
        wanted = RETAINED_PER_FORGOTTEN * len(forget) if self.spec.retained is None else self.spec.retained
        return np.union1d(forget, spread(self.subject.retain, wanted))

    @property
    def units(self) -> int:
        """Steps, and examples whose outputs are predicted."""
        return super().units + len(self.rows)

    def unlearn(self, number: int, progress: Progress) -> Unlearned:
        """Return the weights after the last step."""
        if self._changes is None:
            self._changes = self._predicted(progress)
        else:
            progress.advance(len(self.rows))
        self._targets[number] = self._aims(number, self._changes)
        return super().unlearn(number, progress)

    def objective(self, output: Tensor, batch: Batch, number: int) -> Tensor:
        """Return the mean squared distance to the predictions."""
        targets = self._targets[number][torch.searchsorted(self._sorted, batch.rows)]
        return (self._measured(output, batch) - targets).square().mean()

    def _aims(self, number: int, changes: Tensor) -> Tensor:
        """Return what one checkpoint should output for every matched row, as `_measured`."""
        checkpoint, context = self.subject.context.checkpoint(number), self.subject.context
        batches = context.batches(number, self.rows)
        own = torch.cat([self._measured(checkpoint.output(batch), batch) for batch in batches])
        return own - self.spec.scale * changes.to(own)

    def _predicted(self, progress: Progress) -> Tensor:
        """Return what having the forget set does to every matched row; the same for all checkpoints."""
        parts = []
        for batch in self.subject.context.batches(0, self.rows):
            asked = [batch]
            if self.subject.spec.fit.measurement == "logit":
                classes = self.subject.context.checkpoint(0).output(batch[:1]).shape[1]
                asked = [replace(batch, targets=torch.full_like(batch.rows, label)) for label in range(classes)]
            parts.append(np.concatenate([self._effects(one) for one in asked], axis=1))
            progress.advance(len(batch))
        return torch.from_numpy(np.concatenate(parts))

    def _measured(self, output: Tensor, batch: Batch) -> Tensor:
        """Return what is matched, (batch, 1) or logits (batch, classes)."""
        measurement = self.subject.spec.fit.measurement
        if measurement == "logit":
            return output
        return self.subject.context.task.measure(output, batch, measurement).unsqueeze(1)

    def _effects(self, batch: Batch) -> np.ndarray:
        """Return what having the forget set is worth, (batch, 1)."""
        index, group = self.subject.index, [self.subject.forget]
        query = index.query(batch, self.spec.damping)
        if self.spec.estimator == "newton":
            return index.newton_effects(query, group)
        return index.group_effects(query, group, rescore=True)
