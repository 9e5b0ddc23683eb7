"""Exact leave-one-out for models of one linear layer: `τ_i(z) = ∇m_zᵀ (θ* - θ_{-i})`.

A row is the change of all parameters that having the example made, so nothing is approximated on the query side but the measurement's
slope, and scores need no further damping. The mathematics is in `attribution_core.exact`.

Every process that encodes rows reads the whole training set once: what a linear model knows of it fits in memory.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.group import Group
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError, located
from attribution_core.exact import Estimator, GeneralizedLinear
from attribution_core.method_spec import ExactMethod
from attribution_core.methods.base import Checkpoint, FeatureMethod, QuerySide, TrainRows
from attribution_core.methods.linear_head import (
    Examples,
    check_curvature,
    check_optimum,
    last_linear,
    linear_model,
    parameters_of,
)


class Exact(FeatureMethod):
    """One checkpoint of a linear or logistic regression.

    Args:
        checkpoint: a model whose only parameters are one linear layer's.
        spec: estimator and regulariser.
        training: makes batches of the whole training set, in order.

    Raises:
        InvalidInputError: if the model is something else, or its curvature is too large to decompose.
    """

    shared: ClassVar[bool] = False

    def __init__(self, checkpoint: Checkpoint, spec: ExactMethod, training: Callable[[], Iterable[Batch]]) -> None:
        super().__init__(checkpoint)
        self.spec = spec
        self._training = training
        self._rows = np.empty(0, np.int64)
        self._check_architecture()

    @property
    def dim(self) -> int:
        """The number of parameters."""
        return self.checkpoint.capture.num_parameters

    def encode_train(self, batch: Batch) -> TrainRows:
        """Return `θ* - θ_{-i}`, and its inner product with the gradient of the example's own measurement.

        Raises:
            InvalidInputError: if the weights are not at the optimum and have to be.
            SingularCurvatureError: if one of the examples alone determines a parameter.
        """
        measured = self.encode_query(batch).rows
        model, numbers = self.model, np.searchsorted(self._rows, batch.rows.cpu().numpy())
        with located("/method/l2"):  # only more penalty mends it
            changes = model.parameter_changes(numbers, self.spec.estimator)
        rows = torch.from_numpy(changes).to(measured)
        return TrainRows(rows, torch.ones_like(rows[:, 0]), (measured * rows).sum(1))

    def encode_query(self, batch: Batch) -> QuerySide:
        """Return `∇m_z`."""
        run = self.checkpoint.run(batch)
        measured = self.checkpoint.task.measure(run.output, batch, self.checkpoint.measurement)
        (gradient,) = run.gradients(measured)
        return QuerySide(run.output.detach(), gradient.materialise().flatten(1))

    def newton_effect(self, queries: Batch, group: Group, damping: float) -> Tensor:
        """Return `m(θ*) - m(θ_{-F})`, (queries,), with the measurement evaluated at the changed parameters.

        θ_{-F} is one Newton step on what is left, exact for squared errors; with `estimator: newton` it is the refit.
        """
        checkpoint, model = self.checkpoint, self.model
        run = checkpoint.run(queries)
        (gradient,) = run.gradients(checkpoint.task.measure(run.output, queries, checkpoint.measurement))
        features = gradient.inputs.flatten(1).double().cpu().numpy()
        estimator: Estimator = "newton" if self.spec.estimator == "newton" else "alo"
        change = model.group_change(group.rows, estimator).reshape(model.parameters.shape)
        values = []
        for parameters in (model.parameters, model.parameters - change):
            output = torch.from_numpy(features @ parameters.T).reshape(run.output.shape).to(run.output.device)
            values.append(checkpoint.task.measure(output, queries, checkpoint.measurement))
        return values[0] - values[1]

    @cached_property
    def model(self) -> GeneralizedLinear:
        """The checkpoint as a linear model of the whole training set."""
        examples = Examples.of(self.checkpoint, self._training())
        self._rows = examples.rows  # where an example is among those trained on
        _, layer = last_linear(self.checkpoint.module)
        spec = self.spec
        model = linear_model(self.checkpoint.task, examples, parameters_of(layer), spec.l2, spec.regulariser)
        if spec.optimum == "require":
            check_optimum(model, "polish (explain the optimum nearby) or assume")
        # A refit ends at an optimum, so what it is compared with has to be one.
        polish = spec.optimum == "polish" or spec.estimator == "newton"
        return model.polished() if polish else model

    def _check_architecture(self) -> None:
        holders = [
            part for part in self.checkpoint.module.modules() if any(True for _ in part.parameters(recurse=False))
        ]
        blocks = self.checkpoint.capture.blocks
        if len(holders) != 1 or not isinstance(holders[0], torch.nn.Linear) or len(blocks) != 1:
            raise InvalidInputError("exact attribution is for models of one linear layer", "/method/type")
        check_curvature(self.checkpoint.task, blocks[0], "exact attribution")
