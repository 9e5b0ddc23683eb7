"""Pseudo-gradients of a fit's training examples: how they are drawn, of which examples, and which of them stay in memory."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from attribution_core.curvature import EkfacFactors
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.fisher import Fisher
from attribution_core.curvature.group import Group
from attribution_core.curvature.rows import KeptRows, PseudoRows
from attribution_core.curvature.selection import Frame, Selection
from attribution_core.method_spec import FisherSampling, GaussNewtonMethod, KfacMethod, TrakMethod
from attribution_core.methods.base import Arrays
from attribution_core.progress import Progress

if TYPE_CHECKING:
    from attribution_core.methods.context import FitContext

MAX_ROWS = 1 << 40
_CURVATURE_BYTES = 1 << 30
# Examples on which it is judged which directions of the outputs matter.
_JUDGED = 256


class PseudoGradients:
    """Draws pseudo-gradients under the checkpoints of a fit.

    Args:
        context: loads checkpoints and examples.
    """

    def __init__(self, context: "FitContext") -> None:
        self._context = context
        self._fishers: dict[int, Fisher] = {}
        # Shared by all that solve on training gradients: a fit, and the index by which it measures recall.
        self._kept = KeptRows(_CURVATURE_BYTES)

    def kept(self, number: int, make: Callable[[], PseudoRows]) -> PseudoRows:
        """Return a checkpoint's rows, made if they are not in memory."""
        return self._kept.get(number, make)

    @property
    def held_bytes(self) -> int:
        """Bytes of training gradients in memory, from the first solve on."""
        return self._kept.nbytes

    @property
    def fisher(self) -> Fisher | None:
        """How the method draws pseudo-gradients, if it does, before any checkpoint was seen."""
        method = self._context.spec.method
        if isinstance(method, FisherSampling):
            return Fisher.of(method)
        return Fisher("auto", 1, method.projection.seed) if isinstance(method, TrakMethod) else None

    @property
    def exact(self) -> bool:
        """Whether they are of all labels, or of all directions of the outputs that matter."""
        return self.fisher is not None and self.fisher.exact(self._context.task, self._one_output(0))

    def fisher_of(self, number: int) -> Fisher:
        """Return how a checkpoint's pseudo-gradients are drawn, as told from its outputs on some training examples."""
        if number not in self._fishers:
            fisher, checkpoint = self.fisher or Fisher("auto", 1, 0), self._context.checkpoint(number)
            chooses = fisher.chooses(self._context.task, self._one_output(number))
            # K-FAC counts positions, which not every layer's inputs tell.
            if chooses and not isinstance(self._context.spec.method, KfacMethod):
                judged = self._context.batches(number, self._context.spread(_JUDGED))
                fisher = fisher.shortened(self._context.task, torch.cat([checkpoint.output(batch) for batch in judged]))
            self._fishers[number] = fisher
        return self._fishers[number]

    def _one_output(self, number: int) -> torch.Tensor:
        return self._context.checkpoint(number).output(self._context.source.batch(self._context.training_rows[:1]))

    def draws(self, number: int, fisher: Fisher, rows: np.ndarray) -> Iterator[Draws]:
        """Yield the pseudo-gradients of training rows, batch by batch."""
        checkpoint = self._context.checkpoint(number)
        for batch in self._context.batches(number, rows):
            yield fisher.draws(checkpoint.run(batch), self._context.task, batch, checkpoint.run)

    def group(self, number: int, rows: np.ndarray, weights: np.ndarray) -> Group:
        """Return training examples that leave together, as one checkpoint sees them."""
        fisher = self.fisher_of(number)
        batches, draws = partial(self._context.batches, number, rows), partial(self.draws, number, fisher, rows)
        return Group(rows, self._context.spec.num_training, weights, batches, draws)

    def chosen(self, number: int, fitted: Arrays, progress: Progress | None = None) -> PseudoRows:
        """Return the pseudo-gradients that a fit chose; where it stored no choice, those that it would choose."""
        spec, frame = self._context.spec.method, self._frame(number, fitted)
        assert isinstance(spec, GaussNewtonMethod)
        if "rows.examples" not in fitted:
            return self.rows(number, Fisher.of(spec), spec.curvature_examples, frame, progress)
        selection = Selection.from_arrays(fitted)
        return PseudoRows(self.draws(number, Fisher.of(spec), selection.used), frame=frame, selection=selection)

    def rows(
        self,
        number: int,
        fisher: Fisher,
        examples: int | None,
        frame: Frame | None = None,
        progress: Progress | None = None,
    ) -> PseudoRows:
        """Return the pseudo-gradients of evenly spread training examples, as many as fit the memory set aside.

        Where some rows are left out, examples of whose outputs nothing matters are not even drawn.
        """
        checkpoint = self._context.checkpoint(number)
        first = self._context.source.batch(self._context.training_rows[:1])
        draws = fisher.draws(checkpoint.run(first), self._context.task, first)
        rows = self._context.spread(min(examples or MAX_ROWS, max(1, _CURVATURE_BYTES // PseudoRows([draws]).nbytes)))
        if frame is None or frame.negligible == 0:
            return PseudoRows(self.draws(number, fisher, rows), rows, frame=frame, progress=progress)
        drawn = self.that_matter(number, rows)
        return PseudoRows(self.draws(number, fisher, rows[drawn]), rows, drawn, frame, progress=progress)

    def that_matter(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Return the places of the training examples whose outputs' curvature matters, or of all if none does, ascending."""
        fisher, checkpoint = self.fisher_of(number), self._context.checkpoint(number)
        if not fisher.least:
            return np.arange(len(rows))
        matter = [
            fisher.matters(self._context.task, checkpoint.output(batch))
            for batch in self._context.batches(number, rows)
        ]
        places: np.ndarray = np.flatnonzero(torch.cat(matter).cpu().numpy())
        return places if len(places) else np.arange(len(rows))

    def _frame(self, number: int, fitted: Arrays) -> Frame:
        spec = self._context.spec.method
        assert isinstance(spec, GaussNewtonMethod)
        factors = EkfacFactors.from_arrays(
            self._context.checkpoint(number).capture.blocks, fitted, self._context.device
        )
        return Frame.of(factors, spec.negligible)
