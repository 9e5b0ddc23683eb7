"""A decoder-only transformer language model."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attribution_core.architectures.arguments import TransformerLmArguments
from attribution_core.errors import InvalidInputError


class SelfAttention(nn.Module):
    """Causal multi-head attention, written out so that its result does not depend on a kernel's choice."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, states: Tensor, hidden: Tensor) -> Tensor:
        """Mix (batch, tokens, width) over earlier positions; `hidden` (batch, 1, tokens, tokens) is True where not to look."""
        batch, tokens, width = states.shape
        parts = self.query_key_value(states).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, width / heads)
        scores = (query @ key.mT) / (width // self.heads) ** 0.5
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        mixed: Tensor = self.output((weights @ value).transpose(1, 2).reshape(batch, tokens, width))
        return mixed


class Block(nn.Module):
    """Attention and a two-layer perceptron, each added to the stream after normalising it."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, mlp_width)
        self.contract = nn.Linear(mlp_width, width)

    def forward(self, states: Tensor, hidden: Tensor) -> Tensor:
        """Return the stream after this block."""
        states = states + self.attention(self.attention_norm(states), hidden)
        added: Tensor = states + self.contract(F.gelu(self.expand(self.mlp_norm(states))))
        return added


class Sinusoids(nn.Module):
    """Fixed positions (Vaswani et al. 2017, section 3.5): sines, then cosines, of geometrically spaced frequencies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, places: Tensor) -> Tensor:
        """Return (batch, tokens, width) from positions (batch, tokens)."""
        half = (self.width + 1) // 2
        powers = torch.arange(half, device=places.device, dtype=torch.float64) / half
        angles = places.unsqueeze(-1) / 10_000**powers  # (batch, tokens, half)
        return torch.cat([angles.sin(), angles.cos()], -1)[..., : self.width]


class TransformerLm(nn.Module):
    """Tokens (batch, tokens) to next-token logits (batch, tokens, vocabulary)."""

    def __init__(self, arguments: TransformerLmArguments) -> None:
        super().__init__()
        width = arguments.width
        self.tokens = nn.Embedding(arguments.vocab_size, width)
        self.max_length = arguments.max_length
        self.positions = (
            nn.Embedding(arguments.max_length, width) if arguments.positions == "learned" else Sinusoids(width)
        )
        mlp_width = arguments.mlp_width or 4 * width
        self.blocks = nn.ModuleList(Block(width, arguments.heads, mlp_width) for _ in range(arguments.depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, arguments.vocab_size, bias=False)
        if arguments.tied:
            self.output.weight = self.tokens.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits; `mask` (batch, tokens) is True where a token is real."""
        length = tokens.shape[1]
        if length > self.max_length:
            raise InvalidInputError(f"{length} tokens are more than the model's {self.max_length}")
        places = torch.arange(length, device=tokens.device).expand_as(tokens)
        embedded = self.tokens(tokens)
        states = embedded + self.positions(places).to(embedded.dtype)
        hidden = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
        if mask is not None:
            hidden = hidden | ~mask[:, None, None, :]
        for block in self.blocks:
            states = block(states, hidden)
        logits: Tensor = self.output(self.norm(states))
        return logits


def transformer_lm(arguments: TransformerLmArguments) -> nn.Module:
    """Return the language model."""
    return TransformerLm(arguments)
