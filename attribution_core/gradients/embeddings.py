"""Rules of lookups: `g` says which row was used, `a` is the gradient of what was looked up."""

import torch
from torch import Tensor, nn

from attribution_core.gradients.rule import Arguments, Columns, Factors, LayerRule, Part


def _parts(module: nn.Embedding | nn.EmbeddingBag) -> tuple[Part, ...]:
    columns = (Columns("weight", module.embedding_dim),)
    return (Part(1, module.num_embeddings, columns, inputs_fixed=False, outputs_fixed=True),)


def _embedding(module: nn.Embedding, arguments: Arguments, gradients: Tensor) -> Factors:
    rows = arguments[0].reshape(len(gradients), -1)
    a = gradients.reshape(len(gradients), 1, -1, module.embedding_dim)
    if module.padding_idx is not None:
        a = a * (rows != module.padding_idx).view(len(gradients), 1, -1, 1)
    return a, rows


def _bag(module: nn.EmbeddingBag, arguments: Arguments, gradients: Tensor) -> Factors:
    rows, offsets, weights = arguments
    counted = torch.ones_like(rows, dtype=gradients.dtype) if weights is None else weights.to(gradients.dtype)
    if module.padding_idx is not None:
        counted = counted * (rows != module.padding_idx)
    if offsets is not None:
        starts = offsets[:-1] if module.include_last_offset else offsets
        rows, counted = _padded(rows, starts), _padded(counted, starts)
    if module.mode == "mean":
        counted = counted / counted.sum(1, keepdim=True).clamp(min=1)
    return (gradients.unsqueeze(1) * counted.unsqueeze(-1)).unsqueeze(1), rows


def _padded(values: Tensor, starts: Tensor) -> Tensor:
    """Return flat bags as rows of equal length, filled with zeros."""
    lengths = torch.diff(starts, append=starts.new_tensor([len(values)])).tolist()
    return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True)


def _refusal(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if module.max_norm is not None or module.scale_grad_by_freq:
        return "the layer changes its weights or gradients as it is used"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return "the largest entries of a bag are no sum over its rows"
    return None


def _scaled(module: nn.Embedding, arguments: Arguments, gradients: Tensor) -> Factors:
    return _embedding(module, arguments, gradients * _scale(module))


def _scale(module: nn.Embedding) -> Tensor:
    return torch.as_tensor(module.embed_scale)


# Embeddings of transformers that multiply what they look up by a fixed number (Gemma), told by name.
SCALED = LayerRule(_parts, _scaled, _refusal)  # type: ignore[arg-type]


def scales_what_it_looks_up(module: nn.Module) -> bool:
    """Return whether a module of transformers is an embedding times its `embed_scale`, as tried on one row."""
    kind = type(module)
    ours = kind.__module__.startswith("transformers.") and kind.__name__.endswith("ScaledWordEmbedding")
    if not ours or not isinstance(module, nn.Embedding):
        return False
    with torch.no_grad():
        found: Tensor = module(torch.zeros(1, dtype=torch.int64, device=module.weight.device))
        return torch.allclose(found[0], module.weight[0] * _scale(module).to(module.weight))


EMBEDDINGS: dict[type[nn.Module], LayerRule] = {
    nn.Embedding: LayerRule(_parts, _embedding, _refusal),  # type: ignore[arg-type]
    nn.EmbeddingBag: LayerRule(_parts, _bag, _refusal),  # type: ignore[arg-type]
}
