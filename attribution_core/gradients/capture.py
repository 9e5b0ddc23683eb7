"""Capture of layer inputs and output gradients, without ever forming a parameter gradient by autograd.

Parameters need no gradient. Forward hooks keep each layer's input and make its output part of the graph; one backward pass to those
outputs gives every layer's output gradient for the whole batch, and examples stay apart because each one's objective
depends on its own rows only.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from attribution_core.errors import InvalidInputError, UnsupportedLayerError
from attribution_core.gradients.attention import ATTENTION, Make, in_steps
from attribution_core.gradients.factors import Block, LayerGradient
from attribution_core.gradients.layers import rule_for
from attribution_core.gradients.norms import mixes_examples
from attribution_core.gradients.padding import without_padding
from attribution_core.gradients.plan import Placed, planned
from attribution_core.gradients.rule import Arguments, Part
from attribution_core.layer_names import chosen_layers, is_exact, unmatched_layers

_SEQUENCES = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


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
    """One call of a module, or one step of it.

    Attributes:
        places: the numbers of the blocks that its parameters are in, and which columns of `a` are theirs.
        versions: of the arguments' tensors and of the output, as they were.
        prepare: turns the arguments into what `make` takes.
    """

    places: Sequence[tuple[int, Part]]
    make: Make
    arguments: Arguments
    output: Tensor
    versions: tuple[int, ...]
    prepare: Callable[[Arguments], Arguments]

    def factors(self, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        given = self.output.new_zeros(()).expand_as(self.output) if gradient is None else gradient
        return self.make(self._prepared, _full(given))

    @cached_property
    def _prepared(self) -> Arguments:
        return self.prepare(tuple(_full(value) for value in self.arguments))

    @property
    def spoiled(self) -> bool:
        """Whether the arguments or the output were changed in place since."""
        return _versions(*self.arguments, self.output) != self.versions


@dataclass(frozen=True)
class Pass:
    """One forward pass over a batch; several objectives can be differentiated on it."""

    output: Tensor
    blocks: Sequence[Block]
    uses: Sequence[_Use]

    def gradients(self, objective: Tensor, *, keep: bool = False, mask: Tensor | None = None) -> list[LayerGradient]:
        """Return the per-example gradients of `objective` (batch,), one entry per block.

        Args:
            objective: one value per example, each depending on its own example only.
            keep: keep the graph for another objective.
            mask: (batch, tokens); where it is False the inputs are zero, as the output gradients are anyway.
        """
        outputs = [use.output for use in self.uses]
        return self._gradients(
            torch.autograd.grad(objective.sum(), outputs, retain_graph=keep, allow_unused=True), self.blocks, mask
        )

    def inputs(self, mask: Tensor | None = None) -> list[LayerGradient | None]:
        """Return the gradients of nothing, which have the input factors that every objective has; None for blocks without."""
        fixed = [block for block in self.blocks if block.inputs_fixed]
        found = {gradient.block.name: gradient for gradient in self._gradients([None] * len(self.uses), fixed, mask)}
        return [found.get(block.name) for block in self.blocks]

    def _gradients(
        self, gradients: Sequence[Tensor | None], blocks: Sequence[Block], mask: Tensor | None
    ) -> list[LayerGradient]:
        """Return the gradients of some blocks from those of all uses' outputs."""
        if mask is not None and bool(mask.all()):
            mask = None
        parts: dict[str, list[LayerGradient]] = {block.name: [] for block in blocks}
        for use, gradient in zip(self.uses, gradients, strict=True):
            named = [(self.blocks[number], part) for number, part in use.places]
            wanted = [(block, part) for block, part in named if block.name in parts]
            if not wanted:
                continue
            a, g = use.factors(gradient)
            for block, part in wanted:
                own = LayerGradient(block, a[..., part.start : part.start + part.d_in], g)
                parts[block.name].append(own if mask is None else without_padding(own, use.output.shape, mask))
        return [_joined(block, parts[block.name]) for block in blocks]


class GradientCapture:
    """Per-example gradients of a module in eval mode.

    Layers that share one weight (tied embeddings) are one block whose gradient is the sum over all uses.

    Args:
        module: the network; it is called as it is, hooks are attached only while it runs.
        layers: names or patterns (`layer_names`) of the layers to attribute; all by default.
        precision: of the forward and backward pass; gradients come out in the parameters' own precision.

    Raises:
        InvalidInputError: if a named layer does not exist or cannot be attributed, or none is left.
        UnsupportedLayerError: if batch normalisation is in train mode.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[str] | None = None, precision: torch.dtype | None = None
    ) -> None:
        self.module = module
        self.precision = precision
        self._copies = False  # what follows a layer sees a copy of its output: needed where it works in place
        self._sequence_first = _sequence_first(module)
        self._places: Mapping[tuple[nn.Module, int], list[tuple[int, Part]]]
        self.coverage = self._plan(layers)

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

        Raises:
            UnsupportedLayerError: if a layer's use leaves its gradients undefined or examples mixed.
        """
        if not self._copies:
            given = _Given(self.module)
            try:
                return self._ran(forward, size)
            except (UnsupportedLayerError, RuntimeError):  # torch has no error of its own for leaves changed in place
                self._copies = True
                given.check()
            finally:
                given.remove()
        return self._ran(forward, size)

    def _ran(self, forward: Callable[[nn.Module], Tensor], size: int | None) -> Pass:
        uses: list[_Use] = []
        with self._hooked(uses, size), torch.enable_grad(), self.lowered():
            output = forward(self.module)
        if not uses:
            raise UnsupportedLayerError("the forward pass used none of the attributed layers")
        for use in uses:
            if use.spoiled:
                name = self.blocks[use.places[0][0]].name
                raise UnsupportedLayerError(f"the input of layer {name} is changed in place")
        return Pass(_full(output), self.blocks, uses)

    def output(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return what `run` would output, without keeping anything."""
        with self.lowered():
            output: Tensor = _full(forward(self.module))
        return output

    def lowered(self) -> AbstractContextManager[Any]:
        """Compute in the precision asked for."""
        device = next(self.module.parameters()).device.type
        return torch.autocast(device, self.precision or torch.bfloat16, enabled=self.precision is not None)

    @contextmanager
    def _hooked(self, uses: list[_Use], size: int | None) -> Iterator[None]:
        def note(
            module: nn.Module,
            part: int,
            make: Make,
            arguments: Arguments,
            output: Tensor,
            prepare: Callable[[Arguments], Arguments] = tuple,
        ) -> Tensor:
            places = self._places.get((module, part))
            if places is None:
                return output
            if size is not None and len(output) == 1 != size:
                arguments, output = _spread(arguments, size), output.expand(size, *output.shape[1:])
            if size is not None and (output.dim() == 0 or len(output) != size):
                raise UnsupportedLayerError(
                    f"layer {self.blocks[places[0][0]].name} returns shape {list(output.shape)} for {size} examples: its first dimension "
                    "must be the batch; leave it out of `layers`"
                )
            kept = tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            uses.append(_Use(places, make, kept, output, _versions(*kept, output), prepare))
            # Never the leaf itself, on which others' hooks would fail.
            return output.clone() if self._copies else output.view_as(output)

        def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> Tensor:
            rule = self._rules[module]
            if not isinstance(output, Tensor):
                raise UnsupportedLayerError(
                    f"{type(module).__name__} returns a {type(output).__name__}, not one tensor; leave it out of `layers`"
                )
            arguments = _bound(self._signatures[module], module, positional, named)
            turned = module in self._sequence_first and output.dim() > 2
            if turned:
                arguments, output = tuple(_turned(value) for value in arguments), output.transpose(0, 1)
            seen = (*arguments, output.detach()) if rule.sees_output else arguments
            noted = note(module, 0, partial(rule.factors, module), seen, output, partial(rule.prepare, module))
            return noted.transpose(0, 1) if turned else noted

        modules = {module for module, rule in self._rules.items() if rule is not ATTENTION}
        with ExitStack() as undo:
            for module in modules:
                undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            undo.enter_context(in_steps(self.module, note))
            yield

    def _plan(self, layers: Sequence[str] | None) -> Coverage:
        for name, module in self.module.named_modules():
            if mixes_examples(module):
                raise UnsupportedLayerError(f"layer {name} normalises over the batch: put the model in eval mode")
        named = {
            name: module
            for name, module in self.module.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        }
        chosen = _chosen(layers, named)
        covered: list[tuple[str, nn.Module]] = []
        skipped: list[dict[str, Any]] = []
        for name, module in named.items():
            reason = rule_for(module).refusal(module) if name in chosen else "not asked for"
            if reason is None:
                covered.append((name, module))
            else:
                size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
                skipped.append({"name": name, "reason": reason, "parameters": size})
        if not covered:
            raise InvalidInputError("no layer of this model can be attributed", "/layers")
        self._rules = {module: rule_for(module) for _, module in covered}
        self._signatures = {module: inspect.signature(module.forward) for module in self._rules}
        self.blocks, self.placed, self._places = planned(covered)
        total = sum(parameter.numel() for parameter in self.module.parameters())
        return Coverage(round(100 * self.num_parameters / total, 4), tuple(name for name, _ in covered), tuple(skipped))

    blocks: list[Block]
    placed: list[Placed]


class _Given:
    """Watches what a module is called with, as a pass can be run once more only if that was not changed in place."""

    def __init__(self, module: nn.Module) -> None:
        self._seen: list[Any] = []
        self._versions: tuple[int, ...] = ()
        self.remove = module.register_forward_pre_hook(self._note, with_kwargs=True).remove

    def _note(self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._seen += [*positional, *named.values()]
        self._versions = _versions(*self._seen)

    def check(self) -> None:
        """Refuse what was changed.

        Raises:
            UnsupportedLayerError: if it was.
        """
        if _versions(*self._seen) != self._versions:
            raise UnsupportedLayerError("the model changes its own input in place")


def _chosen(layers: Sequence[str] | None, named: dict[str, nn.Module]) -> set[str]:
    if layers is None:
        return set(named)
    unknown = sorted(unmatched_layers(layers, named))
    if unknown:
        raise InvalidInputError(f"the model has no layer {', '.join(unknown)}; it has {', '.join(named)}", "/layers")
    for name in filter(is_exact, layers):
        reason = rule_for(named[name]).refusal(named[name])
        if reason is not None:
            raise InvalidInputError(f"layer {name} cannot be attributed: {reason}", "/layers")
    return chosen_layers(layers, named)


def _sequence_first(module: nn.Module) -> set[nn.Module]:
    """Return the modules inside torch's own transformer layers that put positions before examples."""
    found: set[nn.Module] = set()
    for parent in module.modules():
        layer = parent.layers[0] if isinstance(parent, nn.TransformerEncoder | nn.TransformerDecoder) else parent
        if isinstance(layer, _SEQUENCES) and not layer.self_attn.batch_first:
            inside = {
                part
                for attention in parent.modules()
                if isinstance(attention, nn.MultiheadAttention)
                for part in attention.modules()
            }
            found |= set(parent.modules()) - inside  # attention is watched with the batch in front
    return found


def _bound(
    signature: inspect.Signature, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
) -> Arguments:
    """Return the arguments of a call in the order of the module's forward, with its defaults."""
    bound = signature.bind(*positional, **named)
    bound.apply_defaults()
    if bound.kwargs:
        raise UnsupportedLayerError(f"{type(module).__name__} takes arguments by name only; leave it out of `layers`")
    return bound.args


def _spread(arguments: Arguments, size: int) -> Arguments:
    """Give every example a copy of what was given once for all."""
    return tuple(
        value.expand(size, *value.shape[1:]) if isinstance(value, Tensor) and value.dim() and len(value) == 1 else value
        for value in arguments
    )


def _turned(value: Any) -> Any:
    return value.transpose(0, 1) if isinstance(value, Tensor) and value.dim() > 1 else value


def _full(value: Any) -> Any:
    """Return half-precision numbers in single precision."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def _versions(*values: Any) -> tuple[int, ...]:
    return tuple(value._version for value in values if isinstance(value, Tensor))


def _joined(block: Block, parts: Sequence[LayerGradient]) -> LayerGradient:
    """Join the uses of one block along the positions, so that their gradients add up."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        raise UnsupportedLayerError(f"the forward pass did not use layer {block.name}; leave it out of `layers`")
    if all(part.one_hot for part in parts):
        outputs = torch.cat([part.outputs for part in parts], dim=1)
    else:
        outputs = torch.cat([part.dense_outputs() for part in parts], dim=2)
    return LayerGradient(block, torch.cat([part.inputs for part in parts], dim=2), outputs)
