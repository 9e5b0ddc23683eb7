"""Small awkward networks, and their per-example gradients by a plain autograd loop."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


class Twice(nn.Module):
    """Uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(torch.tanh(self.shared(x))))


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's, which may have a bias of its own."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.embed(tokens))))


class Residual(nn.Module):
    """Adds in place to a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 5), nn.RMSNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        y += x
        return self.second(y)


class Bag(nn.Module):
    """A bag of tokens, given as rows or flat with offsets, weighted or not."""

    def __init__(self, flat: bool = False, weighted: bool = False, **options: object) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, 6, **options), nn.Linear(6, 3)
        self.flat, self.weighted = flat, weighted

    def forward(self, tokens: Tensor) -> Tensor:
        weights = torch.cos(tokens.double()) if self.weighted else None
        if not self.flat:
            return self.head(self.bag(tokens, per_sample_weights=weights))
        # Bags of different lengths: the first token says how many of the others belong.
        lengths = tokens[:, 0] % tokens.shape[1]
        ends = lengths.cumsum(0)
        flat = torch.cat([row[: int(length)] for row, length in zip(tokens, lengths, strict=True)])
        offsets = torch.cat([ends.new_zeros(1), ends]) if self.bag.include_last_offset else ends - lengths
        return self.head(self.bag(flat, offsets, None if weights is None else torch.cos(flat.double())))


class Attend(nn.Module):
    """Attention over a memory of another length and width, with masks."""

    def __init__(self, *, cross: bool = False, masked: bool = False, causal: bool = False, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.cross, self.masked, self.causal = cross, masked, causal

    def forward(self, x: Tensor) -> Tensor:
        other = torch.cat([x, x.square()], dim=1)
        keys, values = (other[..., : self.attention.kdim], other[..., : self.attention.vdim]) if self.cross else (x, x)
        options: dict[str, object] = {"need_weights": self.masked}
        if self.masked:
            options["attn_mask"] = torch.linspace(-1, 1, x.shape[1] * keys.shape[1]).view(x.shape[1], -1).double()
            options["key_padding_mask"] = torch.zeros(keys.shape[:2], dtype=torch.float64)
            options["key_padding_mask"][:, 2] = -torch.inf
        if self.causal:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            options |= {"attn_mask": hidden, "is_causal": True}
        if not self.attention.batch_first:
            x, keys, values = (part.transpose(0, 1) for part in (x, keys, values))
        mixed, weights = self.attention(x, keys, values, **options)
        mixed = mixed if self.attention.batch_first else mixed.transpose(0, 1)
        return mixed if weights is None else mixed * (1 + weights.square().sum(-1, keepdim=True))


class Encoder(nn.Module):
    """Torch's own transformer encoder, with padding."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=batch_first, norm_first=not batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(4), enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        given = x if self.batch_first else x.transpose(0, 1)
        found = self.encoder(given, src_key_padding_mask=padding)
        return found if self.batch_first else found.transpose(0, 1)


class Custom(nn.Module):
    """Parameters of its own around layers with rules, used in a way no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.scale = nn.Parameter(torch.zeros(1, 3, 4)), nn.Parameter(torch.zeros(()))
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))

    def forward(self, x: Tensor, power: int = 2) -> Tensor:
        return torch.exp(self.scale) * self.inner(x + self.places) ** power


class Named(nn.Module):
    """Calls a layer without a rule by keywords, with what all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.custom, self.head = Custom(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.custom(power=3, x=x))


class Transformed(nn.Linear):
    """A subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x).square()


class Paired(nn.Module):
    """A bilinear layer of an input and of what another layer makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.pair = nn.Bilinear(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.first(x).tanh(), x)


class Renamed(nn.Linear):
    """A subclass that computes what its base does."""


def _weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 2))


def head(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def vectors() -> Tensor:
    return torch.randn(5, 5)


def sequences() -> Tensor:
    return torch.randn(5, 3, 4)


def tokens() -> Tensor:
    return torch.randint(0, 11, (5, 6))


def signals() -> Tensor:
    return torch.randn(5, 4, 9)


def images() -> Tensor:
    return torch.randn(5, 4, 7, 8)


def volumes() -> Tensor:
    return torch.randn(3, 4, 5, 4, 6)


def conv(dims: int = 2, kernel_size: int | tuple[int, ...] = 3, **options: object) -> Callable[[], nn.Module]:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: head(kind(4, 6, kernel_size, **options), nn.ReLU(inplace=True))


def deconv(dims: int = 2, **options: object) -> Callable[[], nn.Module]:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return lambda: head(kind(4, 6, 3, **options))


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(5, 3), vectors),
    "linear on sequences": (lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.GELU(), nn.Linear(4, 3)), sequences),
    "linear under another name": (lambda: nn.Sequential(Renamed(5, 4), nn.Linear(4, 2)), vectors),
    "conv": (conv(), images),
    "conv strided, dilated": (conv(stride=2, dilation=2, padding=(1, 2), bias=False), images),
    "conv same": (conv(padding="same", kernel_size=(2, 3), dilation=2), images),
    "conv valid": (conv(padding="valid"), images),
    "conv reflect": (conv(padding=2, padding_mode="reflect"), images),
    "conv replicate": (conv(padding=(1, 2), padding_mode="replicate"), images),
    "conv circular": (conv(padding=1, padding_mode="circular", stride=(1, 2)), images),
    "conv grouped": (conv(groups=2, padding=1), images),
    "conv depthwise": (lambda: head(nn.Conv2d(4, 8, 3, groups=4)), images),
    "conv 1d": (conv(1, padding=2, stride=2, groups=2), signals),
    "conv 1d same, circular": (conv(1, padding="same", padding_mode="circular", kernel_size=4), signals),
    "conv 3d": (conv(3, padding=(1, 0, 2), stride=(2, 1, 2), dilation=(1, 1, 2)), volumes),
    "conv 3d grouped, replicate": (conv(3, padding=1, padding_mode="replicate", groups=2, kernel_size=2), volumes),
    "transposed": (deconv(), images),
    "transposed strided": (deconv(stride=(2, 3), padding=(1, 2), output_padding=(1, 2), groups=2), images),
    "transposed dilated": (deconv(dilation=(2, 1), stride=2, padding=3, bias=False), images),
    "transposed 1d": (deconv(1, stride=3, output_padding=2, groups=2), signals),
    "transposed 3d": (deconv(3, stride=(1, 2, 1), padding=1, output_padding=(0, 1, 0)), volumes),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 6, padding_idx=3), nn.Linear(6, 2)), tokens),
    "bag sum": (lambda: Bag(mode="sum"), tokens),
    "bag mean, padded": (lambda: Bag(mode="mean", padding_idx=3), tokens),
    "bag weighted": (lambda: Bag(mode="sum", weighted=True), tokens),
    "bag with offsets": (lambda: Bag(flat=True, mode="mean"), tokens),
    "bag with offsets and weights": (
        lambda: Bag(flat=True, weighted=True, mode="sum", include_last_offset=True),
        tokens,
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), sequences),
    "layer norm without bias": (lambda: head(nn.LayerNorm((3, 4), bias=False)), sequences),
    "rms norm": (lambda: head(nn.Linear(4, 6), nn.RMSNorm(6)), sequences),
    "group norm": (lambda: head(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6)), images),
    "instance norm": (lambda: head(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True)), images),
    "instance norm 1d": (lambda: head(nn.InstanceNorm1d(4, affine=True)), signals),
    "instance norm 3d, tracked": (
        lambda: head(nn.InstanceNorm3d(4, affine=True, track_running_stats=True)),
        volumes,
    ),
    "batch norm": (lambda: head(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), images),
    "batch norm 1d": (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), vectors),
    "batch norm 3d": (lambda: head(nn.BatchNorm3d(4)), volumes),
    "a layer used twice": (Twice, vectors),
    "tied weights": (Tied, tokens),
    "tied weights, own bias": (lambda: Tied(bias=True), tokens),
    "in-place residual": (Residual, vectors),
    "attention": (lambda: Attend(batch_first=True), sequences),
    "attention, sequence first, masked": (lambda: Attend(masked=True, bias=False), sequences),
    "attention, causal": (lambda: Attend(causal=True, batch_first=True), sequences),
    "attention, other widths": (lambda: Attend(cross=True, masked=True, kdim=3, vdim=2), sequences),
    "attention, added keys": (
        lambda: Attend(masked=True, batch_first=True, add_bias_kv=True, add_zero_attn=True),
        sequences,
    ),
    "encoder": (lambda: Encoder(batch_first=True), sequences),
    "encoder, sequence first": (lambda: Encoder(batch_first=False), sequences),
    "parameters of its own": (Custom, sequences),
    "no rule, by keywords": (Named, sequences),
    "prelu, forward of its own": (lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), Transformed(4, 2)), vectors),
    "bilinear": (Paired, vectors),
}


def objective(output: Tensor) -> Tensor:
    return torch.sin(output).flatten(1).cumsum(1).square().sum(1)


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with random parameters and statistics, in float64, and its inputs."""
    torch.manual_seed(0)
    build, inputs = CASES[name]
    values = inputs()
    module = build().double().eval()
    values = values.double() if values.is_floating_point() else values
    module(values)  # lazy layers learn their sizes
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for key, value in module.named_buffers():
        if key.endswith("running_mean"):
            nn.init.normal_(value)
        elif key.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 2)
    return module, values


def autograd_loop(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Per-example gradients by one backward pass each, by parameter name."""
    named = dict(module.named_parameters())
    rows = []
    for example in inputs:
        value = objective(module(example.unsqueeze(0))).sum()
        rows.append(torch.autograd.grad(value, list(named.values())))
    return {name: torch.stack(parts) for name, parts in zip(named, zip(*rows, strict=True), strict=True)}


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
