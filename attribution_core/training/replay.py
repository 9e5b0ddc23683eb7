"""The exact derivative of what a trained model measures by the weights of its training examples: training, replayed backwards.

A step is a pure function of parameters, optimizer state and the weights of its examples' losses. From the last step to the first, the
measurement's derivative by what came out of a step becomes, by that step's own derivative, one by what went in, and leaves the share of
its examples behind. Moments before every ⌈√T⌉-th step are kept and those between computed again, so memory grows with √T.

Sources: Engstrom et al. 2025, Optimizing ML Training with Metagradient Descent (REPLAY, metasmoothness); Ilyas & Engstrom 2025, MAGIC.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from attribution_core.data.batch import Batch
from attribution_core.progress import NoProgress, Progress
from attribution_core.training.network import fields_of
from attribution_core.training.optimizers import Tensors
from attribution_core.training.trainer import Run, Step, Trainer


@dataclass(frozen=True)
class Moment:
    """One model between two steps.

    Attributes:
        parameters: by name.
        state: the optimizer's, by name.
    """

    parameters: Tensors
    state: Tensors


@dataclass(frozen=True)
class Recording:
    """A training that can be replayed.

    Attributes:
        moments: before steps 0, stride, 2 · stride, …
        end: after the last step.
    """

    stride: int
    moments: Sequence[Moment]
    end: Moment


class Replay:
    """The training of one run on everything, forwards with any weights and backwards.

    Args:
        trainer: of the model.
        seed: of the run.
    """

    def __init__(self, trainer: Trainer, seed: int) -> None:
        self.trainer = trainer
        self.run = Run(trainer.spec.everything(), seed)
        self.plan = trainer.plan(self.run, "mask")

    @property
    def stride(self) -> int:
        """Steps between two moments that are kept."""
        return math.isqrt(len(self.plan) - 1) + 1

    def record(self, progress: Progress | None = None) -> Recording:
        """Train with all weights 1, and keep what the replay needs; progress counts steps."""
        kept: list[Moment] = []
        weights = self.weights(1)
        stacked = self._start(1)
        for step in self.plan:
            if step.number % self.stride == 0:
                kept.append(_only(stacked))
            stacked = self._forward(stacked, step, weights)
            (progress or NoProgress()).advance(1)
        return Recording(self.stride, kept, _only(stacked))

    def weights(self, models: int) -> Tensor:
        """Return weights of 1, (models, n)."""
        return torch.ones(models, len(self.trainer.data), device=self.trainer.device, dtype=self.trainer.dtype)

    def trained(self, weights: Tensor, progress: Progress | None = None) -> Tensors:
        """Return the parameters (models, …) of models that differ in nothing but the weights (models, n) of examples' losses.

        Progress counts steps of every model.
        """
        stacked = self._start(len(weights))
        for step in self.plan:
            stacked = self._forward(stacked, step, weights)
            (progress or NoProgress()).advance(len(weights))
        return stacked.parameters

    def measured(self, parameters: Tensors, queries: Batch, measurement: str) -> tuple[Tensor, Tensors]:
        """Return one model's measurements (queries,) and their gradients (queries, …)."""

        def one(parameters: Tensors, query: Batch) -> Tensor:
            output = self.trainer.network.output(parameters, query)
            return self.trainer.network.task.measure(output, query, measurement)[0]

        found = [grad_and_value(one)(parameters, queries[n : n + 1]) for n in range(len(queries))]
        gradients = {name: torch.stack([gradient[name] for gradient, _ in found]) for name in parameters}
        return torch.stack([value for _, value in found]), gradients

    def scores(self, recording: Recording, gradients: Tensors, progress: Progress | None = None) -> Tensor:
        """Return `∂m/∂w_i` at weights of 1, (queries, n): `f(S) - f(S∖i)` to first order, in units of the measurement.

        Args:
            recording: of this training.
            gradients: of the measurements by the final parameters, (queries, …).
            progress: counts steps of every query.
        """
        queries = len(next(iter(gradients.values())))
        adjoint = Moment(gradients, _zeros_like(recording.end.state, queries))
        found = self.weights(queries).zero_()
        for number in reversed(range(len(recording.moments))):
            steps = self.plan[number * recording.stride : (number + 1) * recording.stride]
            for step, moment in reversed(list(self._again(recording.moments[number], steps))):
                adjoint, slopes = self._back(moment, step, adjoint)
                found[:, torch.from_numpy(step.rows)] += slopes
                (progress or NoProgress()).advance(queries)
        return found

    def _start(self, models: int) -> Moment:
        one = self.trainer.initial(self.run)
        parameters = {name: value.expand(models, *value.shape).clone() for name, value in one.items()}
        return Moment(parameters, self.trainer.optimizer.init_state(parameters))

    def _forward(self, stacked: Moment, step: Step, weights: Tensor) -> Moment:
        """Return stacked models after a step, each with its own weights (models, n)."""
        models = len(weights)
        batch = self.trainer.step_batch(self.run, step)
        fields = {name: value.expand(models, *value.shape) for name, value in fields_of(batch).items()}
        own = weights[:, torch.from_numpy(step.rows)]  # (models, batch)
        gradients, _ = self.trainer.network.gradients(stacked.parameters, Batch(**fields), own)

        def advance(parameters: Tensors, state: Tensors, gradients: Tensors) -> tuple[Tensors, Tensors]:
            return self.trainer.advance(parameters, state, gradients, step)

        return Moment(*vmap(advance)(stacked.parameters, stacked.state, gradients))

    def _again(self, moment: Moment, steps: Sequence[Step]) -> Iterator[tuple[Step, Moment]]:
        """Yield the steps from a moment on, with the moment before each."""
        stacked, weights = _stacked(moment), self.weights(1)
        for step in steps:
            yield step, _only(stacked)
            stacked = self._forward(stacked, step, weights)

    def _back(self, moment: Moment, step: Step, adjoint: Moment) -> tuple[Moment, Tensor]:
        """Return the derivatives (queries, …) by the moment before a step, and by the weights of its examples, (queries, batch).

        With the step `(θ, s) ← advance(θ, s, ∇L(θ))`, an adjoint is pulled back through `advance` to `λ_θ`, `λ_s` and `u` (by `∇L`); `∇L`
        adds `Hu` to `λ_θ`, as H is symmetric, and its derivative by `w_i` along `u` is `u · ∇ℓ_i / batch`. Both are one derivative
        of `∇L` and of the losses in the direction `u`, forward over reverse.

        Args:
            moment: before the step.
            step: what was done.
            adjoint: derivatives by the moment after it, (queries, …).
        """
        batch = self.trainer.step_batch(self.run, step)
        network, weights = self.trainer.network, self.weights(1)[0, : len(step.rows)]

        def losses(parameters: Tensors) -> tuple[Tensor, Tensor]:
            each = network.task.loss(network.output(parameters, batch), batch) / len(batch)
            return (weights * each).sum(), each

        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            gradients, _ = grad(losses, has_aux=True)(moment.parameters)

            def advance(parameters: Tensors, state: Tensors, gradients: Tensors) -> tuple[Tensors, Tensors]:
                return self.trainer.advance(parameters, state, gradients, step)

            pull = vjp(advance, moment.parameters, moment.state, gradients)[1]

            def back(parameters: Tensors, state: Tensors) -> tuple[Tensors, Tensors, Tensor]:
                through, before, along = pull((parameters, state))
                product, slopes = jvp(grad(losses, has_aux=True), (moment.parameters,), (along,))[1]
                return {name: value + product[name] for name, value in through.items()}, before, slopes

            parameters, state, slopes = self._each(back, adjoint)
        return Moment(parameters, state), slopes

    def _each(
        self, back: Callable[[Tensors, Tensors], tuple[Tensors, Tensors, Tensor]], adjoint: Moment
    ) -> tuple[Tensors, Tensors, Tensor]:
        """Pull every query's derivative back: by one program, or one after the other where the architecture allows no more."""
        if self.trainer.network.vectorises:
            return vmap(back)(adjoint.parameters, adjoint.state)
        queries = len(next(iter(adjoint.parameters.values())))
        sides = (adjoint.parameters, adjoint.state)
        parts = [back(*(_part(side, n) for side in sides)) for n in range(queries)]
        parameters, state, slopes = tree_map(lambda *results: torch.stack(results), *parts)
        return parameters, state, slopes


def metasmoothness(start: Tensors, half: Tensors, full: Tensors) -> float:
    """Return how far parameters that moved one way keep moving that way, in [-1, 1]: 1 where training is smooth in the weights.

    Changes `Δ` of the first half way agree in sign with those of the second, weighted by `|Δ| / ‖Δ‖₁`.

    Args:
        start: parameters after training with weights `w`.
        half: with `w + hv`.
        full: with `w + 2hv`.

    Source: Engstrom et al. 2025, empirical metasmoothness.
    """
    first = torch.cat([(half[name] - start[name]).flatten() for name in start]).double()
    second = torch.cat([(full[name] - half[name]).flatten() for name in start]).double()
    total = float(first.abs().sum())
    return float((first * second.sign()).sum()) / total if total else 1.0


def _stacked(moment: Moment) -> Moment:
    parts = ({name: value.unsqueeze(0) for name, value in side.items()} for side in (moment.parameters, moment.state))
    return Moment(*parts)


def _only(stacked: Moment) -> Moment:
    return Moment(_part(stacked.parameters, 0), _part(stacked.state, 0))


def _part(stacked: Tensors, number: int) -> Tensors:
    return {name: value[number] for name, value in stacked.items()}


def _zeros_like(tensors: Tensors, queries: int) -> Tensors:
    return {name: value.new_zeros(queries, *value.shape) for name, value in tensors.items()}
