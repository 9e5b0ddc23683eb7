"""A model as a function of its parameters, for one set of them or for many stacked ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map

from attribution_core.architectures.build import build
from attribution_core.checkpoints import load_model
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.fit_spec import CheckpointRef
from attribution_core.methods.base import refusing_inputs
from attribution_core.spec import ArchitectureSpec
from attribution_core.tasks import Task
from attribution_core.training.optimizers import Tensors

_BATCH_NORMS = nn.modules.batchnorm._NormBase
_DROPOUTS = nn.modules.dropout._DropoutNd


class Network:
    """An architecture whose parameters are arguments.

    Tied weights are one parameter. Buffers are constants of the architecture.

    Attributes:
        vectorises: many models run as one program; `probe` finds out.

    Raises:
        InvalidInputError: if training it would draw random numbers (dropout), or mix examples (batch statistics).
    """

    def __init__(
        self, spec: ArchitectureSpec, task: Task, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.spec, self.task, self.device, self.dtype = spec, task, device, dtype
        self.module = self._drawn(0).to(device=device, dtype=dtype).requires_grad_(False)
        self.vectorises = True
        _check_replayable(self.module)

    @property
    def num_parameters(self) -> int:
        """Numbers of one model that training decides."""
        return sum(value.numel() for value in self.module.parameters())

    def initial(self, seed: int, checkpoint: CheckpointRef | None = None) -> Tensors:
        """Return one model's parameters before training: a checkpoint's, or drawn with a seed."""
        module = self._drawn(seed)
        if checkpoint is not None:
            with torch.random.fork_rng(devices=[]):
                module = load_model(self.spec, checkpoint.path, self.device, self.dtype)
        return {name: value.detach().to(self.device, self.dtype) for name, value in module.named_parameters()}

    def loaded(self, parameters: Mapping[str, Tensor]) -> nn.Module:
        """Return the module of one model's parameters, as `save_checkpoint` takes it."""
        module = self._drawn(0).to(device=self.device, dtype=self.dtype).requires_grad_(False)
        own = dict(module.named_parameters())
        for name, value in parameters.items():
            own[name].copy_(value)
        return module

    def _drawn(self, seed: int) -> nn.Module:
        """Return the module with initial weights of a seed; the caller's random numbers are left as they were."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(self.spec)

    def output(self, parameters: Tensors, batch: Batch) -> Tensor:
        """Return one model's output."""
        options = {} if batch.mask is None else {"mask": batch.mask}
        output: Tensor = functional_call(self.module, parameters, (batch.inputs,), options)
        return output

    def loss(self, parameters: Tensors, batch: Batch, weights: Tensor) -> Tensor:
        """Return one model's weighted loss `Σ w_i ℓ_i / batch`, whatever the weights (batch,) sum to."""
        return (weights * self.task.loss(self.output(parameters, batch), batch)).sum() / len(batch)

    def gradients(self, parameters: Tensors, batch: Batch, weights: Tensor) -> tuple[Tensors, Tensor]:
        """Return the gradients and losses (models,) of stacked models, each on a batch of its own.

        Args:
            parameters: (models, …) each.
            batch: fields (models, batch, …).
            weights: (models, batch).
        """

        def one(parameters: Tensors, fields: Tensors, weights: Tensor) -> Tensor:
            return self.loss(parameters, Batch(**fields), weights)

        gradients, losses = self._mapped(grad_and_value(one), parameters, fields_of(batch), weights)
        return gradients, losses

    @torch.no_grad()
    def outputs(self, parameters: Tensors, batch: Batch) -> Tensor:
        """Return the outputs of stacked models on one batch, (models, batch, …)."""
        outputs: Tensor = self._mapped(lambda one: self.output(one, batch), parameters)
        return outputs

    def probe(self, batch: Batch) -> Tensor:
        """Return the untrained model's output, and find out whether many models can run as one program on such examples.

        Raises:
            InvalidInputError: if the model cannot take the inputs.
        """
        with refusing_inputs(), torch.no_grad():
            output = batch.forward(self.module)
        self.vectorises = self._vectorises(batch[:1])
        return output

    def activation_bytes(self, batch: Batch) -> int:
        """Return the bytes that a forward pass of one model keeps for its backward pass, parameters aside."""
        kept: dict[int, int] = {}
        own = {name: value.detach().requires_grad_() for name, value in self.module.named_parameters()}
        pointers = {value.data_ptr() for value in own.values()}

        def keep(value: Tensor) -> Tensor:
            if value.data_ptr() not in pointers:
                kept[value.data_ptr()] = value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            output = self.output(own, batch)
        return sum(kept.values()) + output.nbytes

    def _vectorises(self, batch: Batch) -> bool:
        """Return whether the gradient can be mapped over models; a forward pass that branches on values cannot."""
        own = {name: value.detach() for name, value in self.module.named_parameters()}
        twice = {name: torch.stack([value, value]) for name, value in own.items()}
        doubled = Batch(**{name: torch.stack([value, value]) for name, value in fields_of(batch).items()})
        weights = torch.ones(2, len(batch), device=self.device, dtype=self.dtype)
        try:
            self.gradients(twice, doubled, weights)
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            return False
        return True

    def _mapped(self, function: Callable[..., Any], *arguments: Tensors | Tensor) -> Any:
        """Return a function's results over the first dimension of its arguments: by one program, or one after the other."""
        if self.vectorises:
            return vmap(function)(*arguments)
        results = [function(*(_part(argument, k) for argument in arguments)) for k in range(_models(arguments[0]))]
        return tree_map(lambda *parts: torch.stack(parts), *results)


def fields_of(batch: Batch) -> Tensors:
    """Return the tensors that a batch has, by field."""
    found = {"rows": batch.rows, "inputs": batch.inputs, "targets": batch.targets, "mask": batch.mask}
    return {name: value for name, value in found.items() if value is not None}


def stacked_batches(batches: Sequence[Batch]) -> Batch:
    """Return batches of equal length as one, in fields (batches, batch, …); token batches are padded to the longest."""
    if batches[0].mask is not None:
        width = max(batch.inputs.shape[1] for batch in batches)
        batches = [batch.widened(width) for batch in batches]
    fields = [fields_of(batch) for batch in batches]
    return Batch(**{name: torch.stack([one[name] for one in fields]) for name in fields[0]})


def _part(argument: Tensors | Tensor, number: int) -> Tensors | Tensor:
    if isinstance(argument, Tensor):
        return argument[number]
    return {name: value[number] for name, value in argument.items()}


def _models(argument: Tensors | Tensor) -> int:
    return len(argument if isinstance(argument, Tensor) else next(iter(argument.values())))


def _check_replayable(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, _DROPOUTS) and part.p > 0:
            raise InvalidInputError(
                f"{name} is dropout, which cannot be replayed: train the architecture with dropout 0", "/architecture"
            )
        if isinstance(part, _BATCH_NORMS):
            raise InvalidInputError(
                f"{name} normalises by batch statistics, which mix examples: use group normalisation", "/architecture"
            )
