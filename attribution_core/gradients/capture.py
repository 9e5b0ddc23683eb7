"""Capture of layer inputs and output gradients, without ever forming a parameter gradient by autograd.

Parameters need no gradient. Forward hooks keep each layer's input and make its output part of the graph; one backward pass to those
outputs gives every layer's output gradient for the whole batch, and examples stay apart because each one's objective
depends on its own rows only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attribution_core.errors import InvalidInputError, UnsupportedLayerError
from attribution_core.gradients.factors import Block, LayerGradient
from attribution_core.gradients.layers import rule_for


@dataclass(frozen=True)
class Coverage:
    """Which parameters are attributed.

    Attributes:
        percent: of the model's parameters, in [0, 100].
        covered: names of the attributed layers.
        skipped: `{"name", "reason", "parameters"}` of every layer left out.
    """

    percent: float
    covered: tuple[str, ...]
    skipped: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class _Use:
    module: nn.Module
    block: int
    inputs: Tensor
    version: int
    output: Tensor


@dataclass(frozen=True)
class Pass:
    """One forward pass over a batch; several objectives can be differentiated on it."""

    output: Tensor
    blocks: Sequence[Block]
    uses: Sequence[_Use]

    def gradients(self, objective: Tensor, *, keep: bool = False) -> list[LayerGradient]:
        """Return the per-example gradients of `objective` (batch,), one entry per block.

        Args:
            objective: one value per example, each depending on its own example only.
            keep: keep the graph for another objective.
        """
        outputs = [use.output for use in self.uses]
        gradients = torch.autograd.grad(objective.sum(), outputs, retain_graph=keep, allow_unused=True)
        factors: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in range(len(self.blocks))}
        for use, gradient in zip(self.uses, gradients, strict=True):
            if use.inputs._version != use.version:
                raise UnsupportedLayerError(f"the input of layer {self.blocks[use.block].name} is changed in place")
            rule = rule_for(use.module)
            assert rule is not None
            found = torch.zeros_like(use.output) if gradient is None else gradient
            factors[use.block].append(rule.factors(use.module, use.inputs, found))
        return [_joined(block, factors[number], len(self.output)) for number, block in enumerate(self.blocks)]


class GradientCapture:
    """Per-example gradients of a module in eval mode.

    Layers that share one weight (tied embeddings) are one block whose gradient is the sum over all uses.

    Args:
        module: the network; it is called as it is, hooks are attached only while it runs.
        layers: names of the layers to attribute; all supported ones by default.

    Raises:
        InvalidInputError: if a named layer does not exist or cannot be attributed, or none is left.
        UnsupportedLayerError: if batch normalisation is in train mode.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str] | None = None) -> None:
        self.module = module
        self._block_of: dict[nn.Module, int] = {}
        self.blocks: list[Block] = []
        self.coverage = self._plan(layers)

    @property
    def modules(self) -> dict[nn.Module, int]:
        """The number of each attributed module's block."""
        return dict(self._block_of)

    @property
    def num_parameters(self) -> int:
        """Attributed parameters, biases included."""
        return sum(block.numel for block in self.blocks)

    def run(self, forward: Callable[[nn.Module], Tensor], size: int | None = None) -> Pass:
        """Run `forward(module)` once and keep what gradients need.

        Args:
            forward: calls the module.
            size: examples in the batch. A layer that sees one row for all of them (position embeddings often do) then gives
                each example a copy, without which their gradients could not be told apart.
        """
        uses: list[_Use] = []
        with self._hooked(uses, size), torch.enable_grad():
            output = forward(self.module)
        if not uses:
            raise UnsupportedLayerError("the forward pass used none of the attributed layers")
        return Pass(output, self.blocks, uses)

    @contextmanager
    def _hooked(self, uses: list[_Use], size: int | None) -> Iterator[None]:
        def keep(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs = arguments[0].detach()
            if size is not None and len(output) == 1 != size:
                inputs, output = (value.expand(size, *value.shape[1:]) for value in (inputs, output))
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            uses.append(_Use(module, self._block_of[module], inputs, inputs._version, output))
            return output.clone()  # what follows may work in place

        handles = [module.register_forward_hook(keep) for module in self._block_of]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _plan(self, layers: Sequence[str] | None) -> Coverage:
        named = {
            name: module
            for name, module in self.module.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        }
        _check_names(layers, named)
        covered: list[str] = []
        skipped: list[dict[str, Any]] = []
        by_weight: dict[int, int] = {}
        for name, module in named.items():
            reason = self._reason_to_skip(name, module, layers)
            if reason is None:
                self._add(name, module, by_weight)
                covered.append(name)
            else:
                size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
                skipped.append({"name": name, "reason": reason, "parameters": size})
        if not covered:
            raise InvalidInputError("no layer of this model can be attributed", "/layers")
        total = sum(parameter.numel() for parameter in self.module.parameters())
        return Coverage(round(100 * self.num_parameters / total, 4), tuple(covered), tuple(skipped))

    def _reason_to_skip(self, name: str, module: nn.Module, layers: Sequence[str] | None) -> str | None:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.training:
            raise UnsupportedLayerError(f"layer {name} normalises over the batch: put the model in eval mode")
        if layers is not None and name not in layers:
            return "not asked for"
        if rule_for(module) is None:
            return f"no rule for {type(module).__name__}"
        if any(getattr(module, attribute, None) for attribute in ("max_norm", "scale_grad_by_freq")):
            return "the layer changes its weights or gradients as it is used"
        return None

    def _add(self, name: str, module: nn.Module, by_weight: dict[int, int]) -> None:
        rule = rule_for(module)
        assert rule is not None
        weight = id(next(module.parameters(recurse=False)))
        groups, d_out, d_in = rule.shape(module)
        embedding = isinstance(module, nn.Embedding)
        shared = by_weight.get(weight)
        if shared is None:
            by_weight[weight] = len(self.blocks)
            self.blocks.append(Block(name, groups, d_out, d_in, not embedding, embedding))
        elif (groups, d_out, d_in) == self.blocks[shared].shape:
            first = self.blocks[shared]
            self.blocks[shared] = Block(f"{first.name}+{name}", groups, d_out, d_in, False, False)
        else:
            raise UnsupportedLayerError(f"layer {name} shares a weight but not a bias with {self.blocks[shared].name}")
        self._block_of[module] = by_weight[weight]


def _check_names(layers: Sequence[str] | None, named: dict[str, nn.Module]) -> None:
    unknown = sorted(set(layers or ()) - set(named))
    if unknown:
        raise InvalidInputError(f"the model has no layer {', '.join(unknown)}; it has {', '.join(named)}", "/layers")
    without_rule = [name for name in layers or () if rule_for(named[name]) is None]
    if without_rule:
        raise InvalidInputError(f"layer {', '.join(without_rule)} cannot be attributed: no gradient rule", "/layers")


def _joined(block: Block, factors: list[tuple[Tensor, Tensor]], batch: int) -> LayerGradient:
    """Join the uses of one block along the positions, so that their gradients add up."""
    parts = [LayerGradient(block, inputs, outputs) for inputs, outputs in factors]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        raise UnsupportedLayerError(f"the forward pass did not use layer {block.name}; leave it out of `layers`")
    if all(part.one_hot for part in parts):
        outputs = torch.cat([part.outputs for part in parts], dim=1)
    else:
        outputs = torch.cat([part.dense_outputs() for part in parts], dim=2)
    return LayerGradient(block, torch.cat([part.inputs for part in parts], dim=2), outputs)
