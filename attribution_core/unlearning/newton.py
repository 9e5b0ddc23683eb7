"""New weights by a Newton step on the examples that stay, and by their optimum where it can be found.

With `G_F = Σ_F ∇ℓ_i` and training at a minimum of the mean loss plus `l2/2 ‖θ‖²`, the gradient of what stays (its sum form) is
`-(G_F + |F| l2 θ)`, and its curvature `n(H̄ + λ) - H_F + (n - |F|) l2`. The step goes from one to the other; only the forget set's gradients
are taken, so that whatever training left undone elsewhere stays undone.
"""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from attribution_core.curvature import Curvature
from attribution_core.errors import InvalidInputError
from attribution_core.gradients.parameters import ParameterLayout
from attribution_core.method_spec import ExactMethod, ExplicitMethod, FisherMethod
from attribution_core.methods.base import Checkpoint, GradientMethod
from attribution_core.methods.exact import Exact
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import Progress
from attribution_core.training.optimizers import Tensors
from attribution_core.unlearning.base import Subject, Unlearned, Unlearner, spread
from attribution_core.unlearning.spec import ExactNewton, Newton

# What steps were measured with (docs/studies/unlearning.md): the damping that ranks effects best need not be that of a step's size.
_DAMPING = 0.1
_SEARCHED = 4096
_HALVINGS = 12
_ARMIJO = 1e-4


@dataclass(frozen=True)
class _Step:
    """A Newton step.

    Attributes:
        change: of the attributed parameters, by name.
        slope: of the objective of what stays along it, divided by n; below 0.
    """

    change: Tensors
    slope: float


class NewtonUnlearner(Unlearner):
    """One step under the curvature of the index; layers that it leaves out stay as they are."""

    def __init__(self, subject: Subject, spec: Newton) -> None:
        super().__init__(subject)
        self.spec = spec
        self.l2 = subject.spec.l2(spec)

    @property
    def units(self) -> int:
        """Examples whose gradients are taken."""
        return len(self.subject.forget)

    def unlearn(self, number: int, progress: Progress) -> Unlearned:
        """Return `θ + t · step`.

        Raises:
            SingularCurvatureError: if what stays leaves some direction without curvature, and there is no damping.
            InvalidInputError: if a line search is wanted and no step lowers the objective.
            Cancelled: from progress.
        """
        checkpoint = self.subject.context.checkpoint(number)
        step = self._step(number, progress)
        scale = self._searched(number, step) if self.spec.line_search else self.spec.scale
        module = _moved(checkpoint.module, step.change, scale)
        norm = torch.stack([torch.linalg.vector_norm(value) for value in step.change.values()]).norm()
        report = {"scale": scale, "change_norm": scale * float(norm)}
        return Unlearned(dict(module.named_parameters()), report)

    def _step(self, number: int, progress: Progress) -> _Step:
        index = self.subject.index
        assert isinstance(index, LoadedIndex)
        member = index.members[number]
        assert isinstance(member, GradientMethod)
        layout = ParameterLayout(member.checkpoint.capture)
        n = self.subject.num_examples
        released = self._released(member, number, layout, progress)
        curvature = self._curvature(member.curvature, number)
        damping = self._damping()
        solved = [part / n for part in curvature.solve(released, damping)]
        slope = -sum(float((a * b).sum()) for a, b in zip(solved, released, strict=True)) / n
        change = {name: value[0] for name, value in layout.unpacked(solved).items()}
        return _Step(change, slope)

    def _damping(self) -> float:
        """Return the damping asked for, else the index's own, else what steps were measured with."""
        method = self.subject.index.spec.method
        assert isinstance(method, FisherMethod | ExplicitMethod)
        named = (self.spec.damping, method.damping)
        return next((damping for damping in named if damping is not None), _DAMPING)

    def _released(
        self, member: GradientMethod, number: int, layout: ParameterLayout, progress: Progress
    ) -> list[Tensor]:
        """Return `G_F + |F| l2 θ` per block (1, groups, d_out, d_in)."""
        parameters = {name: value.unsqueeze(0) for name, value in layout.parameters().items()}
        weight = len(self.subject.forget) * self.l2
        total = [weight * block for block in layout.packed(parameters)]
        for batch in self.subject.context.batches(number, self.subject.forget):
            gradients = member.observe(batch).training  # of -ℓ
            total = [before - part.total() for before, part in zip(total, gradients, strict=True)]
            progress.advance(len(batch))
        return total

    def _curvature(self, whole: Curvature, number: int) -> Curvature:
        """Return what is left of the curvature, over n, with the penalty of what is left; an explicit one may have its own already."""
        n, forget = self.subject.num_examples, self.subject.forget
        method = self.subject.index.spec.method
        own = method.l2 if isinstance(method, ExplicitMethod) else 0.0
        if self.spec.curvature == "all":
            return whole.penalised(self.l2 - own)
        group = self.subject.context.pseudo_gradients.group(number, forget, np.ones(len(forget)))
        return whole.without(group).penalised(self.l2 * (n - len(forget)) / n - own)

    def _searched(self, number: int, step: _Step) -> float:
        checkpoint, scale = self.subject.context.checkpoint(number), self.spec.scale
        rows = spread(self.subject.retain, _SEARCHED)
        before = self._objective(checkpoint, checkpoint.module, number, step.change, rows)
        for _ in range(_HALVINGS):
            module = _moved(checkpoint.module, step.change, scale)
            after = self._objective(checkpoint, module, number, step.change, rows)
            if after <= before + _ARMIJO * scale * step.slope:
                return scale
            scale /= 2
        raise InvalidInputError(
            "no step along the Newton direction lowers the loss of what stays: the weights are at no optimum, or the "
            "curvature is too far off; raise the damping, or leave out the line search",
            "/method/line_search",
        )

    @torch.no_grad()
    def _objective(
        self, checkpoint: Checkpoint, module: nn.Module, number: int, change: Tensors, rows: np.ndarray
    ) -> float:
        """Return the objective of what stays, its sum form over n, estimated from some rows."""
        context = self.subject.context
        share = len(self.subject.retain) / self.subject.num_examples
        total = 0.0
        for batch in context.source.batches(rows, context.batch_size(number)):
            total += float(checkpoint.task.loss(batch.forward(module), batch).double().sum())
        squares = sum(float(module.get_parameter(name).double().square().sum()) for name in change)
        return share * (total / len(rows) + self.l2 / 2 * squares)


class ExactUnlearner(Unlearner):
    """The optimum without the forget set of a model of one linear layer, in float64 until it is stored."""

    def __init__(self, subject: Subject, spec: ExactNewton) -> None:
        super().__init__(subject)
        self.spec = spec

    @property
    def units(self) -> int:
        """One refit."""
        return 1

    def unlearn(self, number: int, progress: Progress) -> Unlearned:
        """Return the optimum of what stays, or the end of one Newton step.

        Raises:
            InvalidInputError: if there is no optimum, or the weights are not at one and have to be.
            SingularCurvatureError: if what stays does not determine the model.
        """
        context, chosen = self.subject.context, self.spec
        method = ExactMethod(
            type="exact",
            estimator=chosen.estimator,
            l2=self.subject.spec.l2(chosen),
            regulariser=chosen.regulariser,
            optimum=chosen.optimum,
        )
        checkpoint = context.checkpoint(number)
        model = Exact(checkpoint, method, partial(context.batches, number)).model
        change = model.group_change(self.subject.forget, chosen.estimator)
        theta = torch.from_numpy(model.parameters - change.reshape(model.parameters.shape))  # (C, d)
        found = ParameterLayout(checkpoint.capture).unpacked([theta[None, None]])
        original = self.original(number)
        progress.advance(1)
        return Unlearned({name: found[name][0].to(value) for name, value in original.items()})


@torch.no_grad()
def _moved(module: nn.Module, change: Tensors, scale: float) -> nn.Module:
    moved = copy.deepcopy(module)
    for name, value in change.items():
        moved.get_parameter(name).add_(value.to(moved.get_parameter(name)), alpha=scale)
    return moved
