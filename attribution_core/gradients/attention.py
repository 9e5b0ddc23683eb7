"""Multi-head attention in steps that can be watched.

`nn.MultiheadAttention` hands its raw parameters to one function: no module is called for the projections of queries, keys and values, nor for
`out_proj`. While gradients are captured its forward pass is replaced by the same computation step by step; each projection is one block.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attribution_core.errors import UnsupportedLayerError
from attribution_core.gradients.rule import Arguments, Columns, Factors, LayerRule, Part, with_ones

_SIDES = ("query", "key", "value")
Make = Callable[[Arguments, Tensor], Factors]


class Tap(Protocol):
    """Takes note of one step and returns its output, as what follows is to see it."""

    def __call__(self, module: nn.Module, part: int, make: Make, arguments: Arguments, output: Tensor) -> Tensor:
        """Take note of (batch, positions, …) tensors whose factors `make` makes of the arguments and the output gradient."""


def untapped(module: nn.Module, part: int, make: Make, arguments: Arguments, output: Tensor) -> Tensor:
    """Return the output."""
    return output


def _parts(module: nn.MultiheadAttention) -> tuple[Part, ...]:
    size, parts = module.embed_dim, []
    widths = (size, module.kdim, module.vdim)
    for number, (side, width) in enumerate(zip(_SIDES, widths, strict=True)):
        rows = (number * size, (number + 1) * size)
        packed = module.in_proj_weight is not None
        weight = Columns("in_proj_weight", width, rows=rows) if packed else Columns(f"{side[0]}_proj_weight", width)
        bias = () if module.in_proj_bias is None else (Columns("in_proj_bias", 1, rows=rows),)
        parts.append(Part(1, size, (weight, *bias), f".{side}"))
    if module.bias_k is not None:
        parts += [Part(1, size, (Columns(name, 1),), f".{name}") for name in ("bias_k", "bias_v")]
    return tuple(parts)


def _projected(bias: Tensor | None, arguments: Arguments, gradients: Tensor) -> Factors:
    return with_ones(arguments[0].unsqueeze(1), bias), gradients.unsqueeze(1)


def _constant(arguments: Arguments, gradients: Tensor) -> Factors:
    return torch.ones_like(gradients[..., :1]).unsqueeze(1), gradients.unsqueeze(1)


def _no_hook(module: nn.Module, arguments: Arguments, gradients: Tensor) -> Factors:
    raise UnsupportedLayerError("attention is watched by its steps, not as a whole")


ATTENTION = LayerRule(_parts, _no_hook)  # type: ignore[arg-type]


@contextmanager
def in_steps(module: nn.Module, tap: Tap = untapped) -> Iterator[None]:
    """Run every attention layer of a network step by step, and no encoder layer as one fused kernel."""
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as undo:
        for part in module.modules():
            if isinstance(part, nn.MultiheadAttention) and type(part).forward is nn.MultiheadAttention.forward:
                part.forward = partial(_attend, part, tap)  # type: ignore[method-assign]
                undo.callback(delattr, part, "forward")
        torch.backends.mha.set_fastpath_enabled(False)
        undo.callback(torch.backends.mha.set_fastpath_enabled, fused)
        yield


def _attend(
    module: nn.MultiheadAttention,
    tap: Tap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Do what the module's own forward does."""
    if query.dim() != 3:
        raise UnsupportedLayerError("attention needs a batch: queries of shape (batch, positions, width)")
    sides = [query, key, value] if module.batch_first else [side.transpose(0, 1) for side in (query, key, value)]
    q, k, v = (_project(module, tap, number, side) for number, side in enumerate(sides))
    if module.bias_k is not None and module.bias_v is not None:
        k, v = (
            torch.cat([side, tap(module, 3 + number, _constant, (), bias.expand(len(side), -1, -1))], dim=1)
            for number, (side, bias) in enumerate(((k, module.bias_k), (v, module.bias_v)))
        )
    if module.add_zero_attn:
        k, v = (F.pad(side, (0, 0, 0, 1)) for side in (k, v))
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(
            1
        )  # as the kernel has it
    hidden = _additive(attn_mask, key_padding_mask, q, k, module.num_heads)
    q, k, v = (side.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for side in (q, k, v))
    scores = (q @ k.mT) / q.shape[-1] ** 0.5  # (batch, heads, targets, sources)
    weights = _softmax(scores if hidden is None else scores + hidden)
    weights = F.dropout(weights, module.dropout, module.training)
    mixed: Tensor = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
    return (mixed if module.batch_first else mixed.transpose(0, 1)), shown


def _project(module: nn.MultiheadAttention, tap: Tap, number: int, inputs: Tensor) -> Tensor:
    part = slice(number * module.embed_dim, (number + 1) * module.embed_dim)
    packed = module.in_proj_weight
    weight = getattr(module, f"{_SIDES[number][0]}_proj_weight") if packed is None else packed[part]
    bias = None if module.in_proj_bias is None else module.in_proj_bias[part]
    return tap(module, number, partial(_projected, bias), (inputs,), F.linear(inputs, weight, bias))


def _additive(mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, heads: int) -> Tensor | None:
    """Return both masks as numbers added to the scores (batch, heads, targets, sources); appended keys are seen by all."""
    total: Tensor | None = None
    if mask is not None:
        shaped = mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads))
        total = _widened(_numbers(shaped, q), k)
    if padding is not None:
        added = _widened(_numbers(padding, q), k)[:, None, None, :]
        total = added if total is None else total + added
    return total


def _numbers(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def _widened(mask: Tensor, k: Tensor) -> Tensor:
    return F.pad(mask, (0, k.shape[1] - mask.shape[-1]))


def _softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the sources, zero for a target that may see none."""
    blind = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
