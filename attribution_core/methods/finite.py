"""Which training example is at fault where what is made of all of them is not finite."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.fisher import Observed, observe
from attribution_core.errors import InvalidInputError, NotFiniteError, SingularCurvatureError
from attribution_core.gradients import LayerGradient
from attribution_core.methods.context import FitContext
from attribution_core.progress import Progress


def refuse_example(row: int) -> NoReturn:
    """Refuse a training example whose gradient is not finite."""
    raise InvalidInputError(f"the model gives no finite gradient for training example {row}")


def check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse sums that are not finite.

    Raises:
        NotFiniteError: if one is not.
    """
    if not all(np.isfinite(value).all() for value in arrays.values()):
        raise NotFiniteError("sums over the training examples' gradients are not finite")


@contextmanager
def naming_the_example(context: FitContext, checkpoints: Iterable[int], progress: Progress) -> Iterator[None]:
    """Say of which training example the gradient is not finite, or has no finite square, where the work inside fails for that.

    Nothing is looked at as long as the work does not fail.

    Raises:
        InvalidInputError: naming the first such example, in place of what its numbers led to.
    """
    try:
        yield
    except (NotFiniteError, SingularCurvatureError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        for number in checkpoints:
            _refuse_unusable(context, number, progress)
        raise


def _refuse_unusable(context: FitContext, number: int, progress: Progress) -> None:
    checkpoint, fisher = context.checkpoint(number), context.pseudo_gradients.fisher_of(number)
    for batch in context.batches(number):
        check_squares(observe(checkpoint.run(batch), checkpoint.task, batch, checkpoint.measurement, fisher))
        progress.advance(0)


def check_squares(observed: Observed) -> None:
    """Refuse training examples whose gradients are not finite, or have no finite square.

    Raises:
        InvalidInputError: naming the first.
    """
    usable = torch.stack([_has_finite_square(gradient) for gradient in observed.gradients()]).all(0)
    if not bool(usable.all()):
        refuse_example(int(observed.batch.rows[~usable][0]))


def _has_finite_square(gradient: LayerGradient) -> Tensor:
    squares = gradient.inputs.square().flatten(1).sum(1)
    if not gradient.one_hot:
        squares = squares * gradient.outputs.square().flatten(1).sum(1)
    return squares.isfinite()
