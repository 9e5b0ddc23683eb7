"""What unlearning works on, and the contract of its methods."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from attribution_core.methods.context import FitContext
from attribution_core.methods.opening import AnyIndex, open_index
from attribution_core.progress import Progress
from attribution_core.training.optimizers import Tensors
from attribution_core.unlearning.spec import UnlearnSpec


class Subject:
    """Checkpoints with a forget set, loaded once.

    Raises:
        InvalidInputError: if it cannot be done.
        FingerprintMismatchError: if data or weights are not those named.
    """

    def __init__(self, spec: UnlearnSpec, device: str = "cpu") -> None:
        spec.check()
        self.spec, self.device = spec, device
        self.context = FitContext(spec.fit, device)
        self.forget, self.retain = spec.forgotten(), spec.retained()

    @property
    def num_examples(self) -> int:
        """n, the size of the whole training set."""
        return self.spec.fit.num_training

    @cached_property
    def index(self) -> AnyIndex:
        """The fitted index."""
        return open_index(self.spec.index, self.spec.fit, self.context, self.device)


@dataclass(frozen=True)
class Unlearned:
    """New weights of one checkpoint.

    Attributes:
        parameters: all of them, by name.
        report: numbers about how it went.
    """

    parameters: dict[str, Tensor]
    report: dict[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(value.isfinite().all()) for value in self.parameters.values())


class Unlearner(ABC):
    """One way to unlearn."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @property
    @abstractmethod
    def units(self) -> int:
        """What one checkpoint counts in progress."""

    @abstractmethod
    def unlearn(self, number: int, progress: Progress) -> Unlearned:
        """Return one checkpoint's weights without the forget set; the same bytes whoever computes them, on one kind of machine.

        Raises:
            InvalidInputError: if the checkpoint or the index does not allow it.
            Cancelled: from progress.
        """

    def original(self, number: int) -> Tensors:
        """Return a checkpoint's weights as they are."""
        module = self.subject.context.checkpoint(number).module
        return {name: value.detach().clone() for name, value in module.named_parameters()}


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` of the rows, evenly spread."""
    if count >= len(rows):
        return rows
    places = (np.arange(count) + 0.5) * len(rows) / max(1, count)
    return rows[places.astype(np.int64)]
