"""Passes over training examples that collect what EK-FAC needs of the Fisher matrix."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from attribution_core.curvature.ekfac import CovarianceSums, Eigenbasis, EigenvalueSums
from attribution_core.data.batch import Batch
from attribution_core.gradients import GradientCapture, LayerGradient
from attribution_core.progress import Progress
from attribution_core.spec import EkfacMethod
from attribution_core.tasks import FisherKind, Task

MAX_ENUMERATED_LABELS = 32


@dataclass(frozen=True)
class FisherPasses:
    """The model's Fisher matrix over batches of examples.

    Attributes:
        method: says whether labels are enumerated, sampled or the data's own.
    """

    module: nn.Module
    capture: GradientCapture
    task: Task
    method: EkfacMethod

    def covariances(self, batches: Iterable[Batch], progress: Progress) -> CovarianceSums:
        """Return summed second moments of inputs and pseudo-gradients."""
        sums = CovarianceSums(self.capture.blocks)
        for batch in batches:
            for number, gradients in enumerate(self._pseudo_gradients(batch)):
                sums.add(_without_padding(gradients, batch), first=number == 0)
            progress.advance(len(batch))
        return sums

    def eigenvalues(self, batches: Iterable[Batch], basis: Eigenbasis, progress: Progress) -> EigenvalueSums:
        """Return summed squares of rotated pseudo-gradients."""
        sums = EigenvalueSums(basis)
        for batch in batches:
            for gradients in self._pseudo_gradients(batch):
                sums.add(gradients)
            progress.advance(len(batch))
        return sums

    def _pseudo_gradients(self, batch: Batch) -> Iterator[list[LayerGradient]]:
        run = self.capture.run(batch.forward, len(batch))
        self.task.check(run.output, batch)
        kind = self._kind(self.task.exact_labels(run.output))
        for loss in self.task.pseudo_losses(run.output, batch, kind, self.method.seed, self.method.samples):
            yield run.gradients(loss, keep=True)

    def _kind(self, labels: int | None) -> FisherKind:
        if self.method.fisher != "auto":
            return self.method.fisher
        return "exact" if labels is not None and labels <= MAX_ENUMERATED_LABELS else "sampled"


def _without_padding(gradients: list[LayerGradient], batch: Batch) -> list[LayerGradient]:
    """Set the inputs of padded positions to zero; their output gradients are zero already, but `A` does not look at those.

    A weight used several times has the positions of one use after those of the other.
    """
    if batch.mask is None:
        return gradients
    tokens = batch.mask.shape[1]
    masked = []
    for gradient in gradients:
        uses, rest = divmod(gradient.inputs.shape[2], tokens)
        real = batch.mask.repeat(1, uses)[:, None, :, None]
        masked.append(gradient if rest or not uses else replace(gradient, inputs=gradient.inputs * real))
    return masked
