"""A network's last linear layer as a linear model of its inputs, in float64: what `exact` and `representer` have in common."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError, UnsupportedLayerError
from attribution_core.exact import GeneralizedLinear, LogisticRegression, RidgeRegression, optimality
from attribution_core.exact.glm import Regulariser
from attribution_core.gradients import Block, Pass
from attribution_core.methods.base import Checkpoint
from attribution_core.tasks.base import Task, required_targets
from attribution_core.tasks.classification import Classification

# The side of a dense matrix in float64 that is decomposed: 2 GB.
MAX_CURVATURE = 16_384


def last_linear(module: nn.Module) -> tuple[str, nn.Linear]:
    """Return a network's last linear layer and its name.

    Raises:
        UnsupportedLayerError: if it has none.
    """
    linear = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise UnsupportedLayerError("the model has no linear layer whose input could represent an example")
    return linear[-1]


def parameters_of(layer: nn.Linear) -> np.ndarray:
    """Return weight and bias, (C, d), the bias last."""
    columns = [layer.weight] if layer.bias is None else [layer.weight, layer.bias.unsqueeze(1)]
    parameters: np.ndarray = torch.cat(columns, dim=1).detach().double().cpu().numpy()
    return parameters


@dataclass(frozen=True)
class Examples:
    """Examples as a linear layer sees them.

    Attributes:
        rows: their numbers, (n,).
        features: the layer's inputs, (n, d), with ones if it has a bias.
        targets: as the loss takes them.
    """

    rows: np.ndarray
    features: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, checkpoint: Checkpoint, batches: Iterable[Batch]) -> "Examples":
        """Return examples as the only layer attributed sees them.

        Raises:
            InvalidInputError: if an example has no target.
        """
        rows, features, targets = [], [], []
        for batch in batches:
            run = checkpoint.run(batch)
            rows.append(batch.rows.cpu().numpy())
            features.append(inputs_of(run, checkpoint.task.loss(run.output, batch)))
            targets.append(required_targets(batch).cpu().numpy())
        joined = np.concatenate(targets)
        if not is_classification(checkpoint.task):
            joined = joined.reshape(len(joined), -1).astype(np.float64)
        return cls(np.concatenate(rows), np.concatenate(features), joined)


def inputs_of(run: Pass, objective: Tensor) -> np.ndarray:
    """Return the inputs of the only layer attributed, (batch, d), with ones if it has a bias; `objective` (batch,) depends on them."""
    (gradient,) = run.gradients(objective)
    inputs: np.ndarray = gradient.inputs.flatten(1).double().cpu().numpy()
    return inputs


def linear_model(
    task: Task, examples: Examples, parameters: np.ndarray, l2: float, regulariser: Regulariser = "fixed"
) -> GeneralizedLinear:
    """Return the layer with parameters (C, d) on examples, under the mean loss + l2/2 ‖θ‖².

    Where neither data nor penalty have a say, training leaves a parameter as it was initialised.
    """
    kind = LogisticRegression if is_classification(task) else RidgeRegression
    penalty, free = l2 * len(examples.rows), l2 == 0
    model: GeneralizedLinear = kind(
        examples.features, examples.targets, parameters, penalty, regulariser=regulariser, pseudo_inverse=free
    )
    return model


def is_classification(task: Task) -> bool:
    """Return whether the loss is a cross-entropy; else it is a squared error."""
    return isinstance(task, Classification)


def check_curvature(task: Task, block: Block, kind: str) -> None:
    """Refuse a layer whose curvature is too large to decompose.

    Raises:
        InvalidInputError: naming the method.
    """
    side = block.numel if is_classification(task) else block.d_in
    if side > MAX_CURVATURE:
        raise InvalidInputError(
            f"the curvature of this layer has {side} rows, and {kind} takes up to {MAX_CURVATURE}: use ekfac",
            "/method/type",
        )


def check_optimum(model: GeneralizedLinear, instead: str) -> None:
    """Refuse parameters that leave more undone than a tenth of one example's influence.

    Args:
        model: on the training set.
        instead: what `optimum` can be set to.

    Raises:
        InvalidInputError: naming `optimum`.
    """
    found = optimality(model)
    if not found.reached:
        raise InvalidInputError(
            f"the weights are not at the optimum of the mean loss + l2/2·‖θ‖²: it is about {found.in_examples:.2g} typical "
            f"examples' influences away. Give the l2 that the model was trained with, train it further, or set optimum to {instead}",
            "/method/optimum",
        )
