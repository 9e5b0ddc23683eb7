"""Representer points: a prediction as a sum over training examples, by the optimum of the last linear layer under a penalty.

Where Θ* minimises `(1/n) Σ ℓ_i(Θ a_i) + (l2/2) ‖Θ‖²` over the last layer's inputs a (with a 1 for the bias), its gradient is 0:

    Θ* = Σ α_i a_iᵀ,   o(z) = Θ* a_z = Σ α_i (a_iᵀ a_z),   α_i = −(1/(n·l2)) ∂ℓ_i/∂o_i.

The paper's λ ‖Θ‖² is l2 = 2λ. A score is what example i adds to the outputs, in units of the measurement: `τ_i(z) = (∂m_z/∂o)ᵀ α_i (a_iᵀ a_z)`, both slopes
at the optimum; of a measurement that is linear in the outputs (logit, prediction) scores sum to it. Example i gone, the optimum moves by H⁻¹ where this
has (n·l2)⁻¹: scores have the sign of leaving out, its size where the penalty outweighs the data, and are too large elsewhere.

Networks do not end training at that optimum: `refit` finds it, by Newton steps from the weights there are, and the index tells how far it was.

Source: Yeh et al. 2018, theorem 3.1 and section 3.2.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError, located
from attribution_core.exact import relative_gradient
from attribution_core.method_spec import RepresenterMethod
from attribution_core.methods.base import Arrays, Checkpoint, FeatureMethod, QuerySide, TrainRows
from attribution_core.methods.linear_head import (
    Examples,
    check_curvature,
    check_optimum,
    inputs_of,
    last_linear,
    linear_model,
    parameters_of,
)

# By how much the layer's own arithmetic, in bfloat16 at worst, may differ from ours, as a share of the largest output.
_ROUNDING = 0.02


class Representer(FeatureMethod):
    """Representer points of one checkpoint.

    Args:
        checkpoint: captures its last linear layer alone.
        spec: the penalty, and what is done about weights that are not at the optimum.
        fitted: what `fit_head` found; empty before.

    Raises:
        InvalidInputError: if the layer is too large to refit.
    """

    shared: ClassVar[bool] = False

    def __init__(self, checkpoint: Checkpoint, spec: RepresenterMethod, fitted: Arrays) -> None:
        super().__init__(checkpoint)
        self.spec, self._fitted = spec, fitted
        check_curvature(checkpoint.task, checkpoint.capture.blocks[0], "representer")

    @property
    def dim(self) -> int:
        """The number of the layer's parameters."""
        return self.checkpoint.capture.num_parameters

    def examples(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return what `fit_head` needs of training examples.

        Raises:
            InvalidInputError: if the model's output is not that of its last linear layer.
        """
        seen = Examples.of(self.checkpoint, [batch])
        self._check_output(seen.features, batch)
        return vars(seen)

    def fit_head(self, shards: Sequence[Arrays]) -> dict[str, np.ndarray]:
        """Return the layer at its optimum, `head` (C, d), and how far from it the weights were; see `described`.

        Raises:
            InvalidInputError: if the weights are not at the optimum and have to be, or none is found.
        """
        examples = Examples(**{name: np.concatenate([part[name] for part in shards]) for name in shards[0]})
        _, layer = last_linear(self.checkpoint.module)
        model = linear_model(self.checkpoint.task, examples, parameters_of(layer), self.spec.l2)
        if self.spec.optimum == "require":
            check_optimum(model, "refit")
        with located("/method/l2"):  # only more penalty mends it
            refit = model.polished() if self.spec.optimum == "refit" else model
        distance = [relative_gradient(model), _correlation(model.outputs, refit.outputs)]
        return {"head": refit.parameters, "distance": np.array(distance)}

    def encode_train(self, batch: Batch) -> TrainRows:
        """Return `α_i a_iᵀ`, flat, and the score of each example for itself."""
        seen = Examples.of(self.checkpoint, [batch])
        model = linear_model(self.checkpoint.task, seen, self.head, self.spec.l2)
        alphas = -model.slopes / (self.checkpoint.num_examples * self.spec.l2)  # (batch, C)
        rows, own = _outer(alphas, seen.features), _outer(self._slopes(seen.features, batch), seen.features)
        stored = torch.from_numpy(rows).to(batch.inputs.device, torch.float32)
        return TrainRows(stored, torch.ones_like(stored[:, 0]), torch.from_numpy((own * rows).sum(1)).to(stored))

    def encode_query(self, batch: Batch) -> QuerySide:
        """Return `(∂m_z/∂o) a_zᵀ`, flat, at the outputs of the optimum; the outputs told are the checkpoint's own."""
        run = self.checkpoint.run(batch)
        features = inputs_of(run, run.output.reshape(len(batch), -1).sum(1))
        rows = torch.from_numpy(_outer(self._slopes(features, batch), features))
        return QuerySide(run.output.detach(), rows.to(run.output))

    def _slopes(self, features: np.ndarray, batch: Batch) -> np.ndarray:
        """Return `∂m/∂o` at the optimum's outputs, (batch, C)."""
        outputs = torch.from_numpy(features @ self.head.T).to(batch.inputs.device).requires_grad_()
        measured = self.checkpoint.task.measure(outputs, batch, self.checkpoint.measurement)
        (slopes,) = torch.autograd.grad(measured.sum(), outputs)
        found: np.ndarray = slopes.cpu().numpy()
        return found

    def _check_output(self, features: np.ndarray, batch: Batch) -> None:
        """Refuse models that do something to the layer's output, or use it several times."""
        theta = parameters_of(last_linear(self.checkpoint.module)[1])
        output = self.checkpoint.output(batch).double().cpu().numpy().reshape(len(batch), -1)
        if (features.shape[1], output.shape[1]) == theta.shape[::-1]:
            difference = np.abs(features @ theta.T - output).max()
            if difference <= _ROUNDING * np.abs(output).max():
                return
        raise InvalidInputError("representer is for models that end in a linear layer", "/method/type")

    @property
    def head(self) -> np.ndarray:
        """Θ*, (C, d)."""
        return self._fitted["head"]


def described(distance: np.ndarray) -> dict[str, float | None]:
    """Return how far a checkpoint's last layer was from its optimum; null where that is not a number.

    `relative_gradient`: of the objective, as a share of all examples' gradients. `correlation`: of the outputs for training examples before and
    after the refit.
    """
    names = ("relative_gradient", "correlation")
    return {name: value if np.isfinite(value) else None for name, value in zip(names, distance.tolist(), strict=True)}


def _correlation(before: np.ndarray, after: np.ndarray) -> float:
    """Return Pearson's correlation of all outputs; not a number where they are all alike."""
    first, second = before - before.mean(), after - after.mean()
    norm = np.linalg.norm(first) * np.linalg.norm(second)
    return float((first * second).sum() / norm) if norm else np.nan


def _outer(outputs: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the outer products of (batch, C) and (batch, d), (batch, C·d)."""
    return np.asarray((outputs[:, :, None] * features[:, None, :]).reshape(len(features), -1))
