"""The built-in architectures: schemas, bounds, shapes of outputs, and what must not change a result."""

import pytest
import torch
from torch import nn

from attribution_core.architectures import build as build_module
from attribution_core.architectures.build import build, skeleton
from attribution_core.architectures.registry import ARCHITECTURES, describe_architectures
from attribution_core.errors import ArchitectureArgumentsError, InvalidInputError, UnknownArchitectureError
from attribution_core.spec import ArchitectureSpec

LM = {"vocab_size": 11, "max_length": 16, "width": 8, "depth": 2, "heads": 2}
OUTPUTS = [
    ("linear", {"input_dim": 6}, (2, 6), (2, 1)),
    ("linear", {"input_dim": 6, "output_dim": 4, "bias": False}, (2, 6), (2, 4)),
    ("logistic", {"input_dim": 6, "num_classes": 3}, (2, 2, 3), (2, 3)),
    ("mlp", {"input_dim": 6, "hidden": [5, 4], "output_dim": 3, "activation": "gelu"}, (2, 1, 2, 3), (2, 3)),
    ("cnn", {"input_shape": [1, 9, 7], "channels": [4, 6], "num_classes": 3}, (2, 1, 9, 7), (2, 3)),
    (
        "cnn",
        {"input_shape": [3, 8, 8], "channels": [4, 8], "num_classes": 3, "groups": 4, "hidden": 5, "kernel_size": 5},
        (2, 3, 8, 8),
        (2, 3),
    ),
    ("resnet9", {"num_classes": 3, "width": 4}, (2, 3, 16, 16), (2, 3)),
    ("resnet9", {"num_classes": 3, "width": 4, "norm": "batch", "input_channels": 1}, (2, 1, 16, 16), (2, 3)),
    ("resnet9", {"num_classes": 3, "width": 4, "norm": "none"}, (2, 3, 16, 16), (2, 3)),
]


def made(name: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return build(ArchitectureSpec(name=name, arguments=arguments))


@pytest.mark.parametrize(("name", "arguments", "shape", "wanted"), OUTPUTS)
def test_outputs_have_the_promised_shape(name: str, arguments: dict, shape: tuple, wanted: tuple) -> None:
    module = made(name, **arguments)
    inputs = torch.randn(shape)
    output = module(inputs)
    assert output.shape == wanted
    assert not module.training
    assert torch.allclose(module(inputs[:1]), output[:1], atol=1e-5)  # an example does not see its batch


@pytest.mark.parametrize(("name", "arguments", "shape", "wanted"), OUTPUTS)
def test_the_skeleton_lists_what_the_module_holds(name: str, arguments: dict, shape: tuple, wanted: tuple) -> None:
    module = made(name, **arguments)
    listed = skeleton(ArchitectureSpec(name=name, arguments=arguments))
    floats = {key: list(value.shape) for key, value in module.state_dict().items() if value.is_floating_point()}
    assert {key: entry["shape"] for key, entry in listed.items()} == floats
    assert {key for key, entry in listed.items() if entry["trainable"]} == dict(module.named_parameters()).keys()


def test_groups_of_a_convolution_are_those_asked_for() -> None:
    module = made("cnn", input_shape=[3, 8, 8], channels=[4, 8], num_classes=2, groups=4)
    assert [layer.groups for layer in module.modules() if isinstance(layer, nn.Conv2d)] == [1, 4]


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_a_token_depends_on_no_later_one(positions: str) -> None:
    module = made("transformer_lm", **LM, positions=positions)
    tokens = torch.randint(0, 11, (2, 9))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    first, second = module(tokens), module(changed)
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:])


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_logits_do_not_depend_on_padding(positions: str) -> None:
    module = made("transformer_lm", **LM, positions=positions).double()
    tokens = torch.randint(0, 11, (3, 6))
    alone = module(tokens)
    for width, filler in ((8, 0), (16, 10)):
        padded = torch.full((3, width), filler)
        padded[:, :6] = tokens
        mask = torch.arange(width).expand(3, width) < 6
        assert torch.allclose(module(padded, mask=mask)[:, :6], alone, atol=1e-12)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_the_order_of_tokens_matters(positions: str) -> None:
    module = made("transformer_lm", **LM, positions=positions)
    first, second = module(torch.tensor([[1, 2, 3]])), module(torch.tensor([[2, 1, 3]]))
    assert not torch.allclose(first[:, 2], second[:, 2], atol=1e-4)


def test_sinusoids_are_those_of_the_paper_and_no_weights() -> None:
    module = made("transformer_lm", **{**LM, "width": 4}, positions="sinusoidal")
    assert "positions.weight" not in module.state_dict()
    places = torch.tensor([[0, 1, 5]])
    angles = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    wanted = torch.stack([angles.sin(), (angles / 100).sin(), angles.cos(), (angles / 100).cos()], -1)
    assert torch.allclose(module.positions(places)[0], wanted)


def test_attention_is_the_reference_attention() -> None:
    module = made("transformer_lm", **LM).double()
    states = torch.randn(2, 5, 8, dtype=torch.float64)
    attention = module.blocks[0].attention
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)[None, None]
    parts = attention.query_key_value(states).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    reference = nn.functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).reshape(2, 5, 8)
    assert torch.allclose(attention(states, hidden), attention.output(reference), atol=1e-12)


def test_tied_weights_are_one_weight() -> None:
    module = made("transformer_lm", **LM, tied=True)
    assert module.output.weight is module.tokens.weight
    listed = skeleton(ArchitectureSpec(name="transformer_lm", arguments={**LM, "tied": True}))
    assert {name: entry["tied_to"] for name, entry in listed.items() if entry["tied_to"]} == {
        "output.weight": "tokens.weight"
    }
    assert listed["output.weight"]["trainable"]


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="17 tokens"):
        made("transformer_lm", **LM)(torch.zeros(1, 17, dtype=torch.long))


REFUSED = [
    ("linear", {}, "input_dim"),
    ("linear", {"input_dim": 0}, "input_dim"),
    ("linear", {"input_dim": 10**12}, "input_dim"),
    ("linear", {"input_dim": "many"}, "input_dim"),
    ("linear", {"input_dim": float("nan")}, "input_dim"),
    ("linear", {"input_dim": 2, "device": "cuda"}, "device"),
    ("logistic", {"input_dim": 2, "num_classes": 1}, "num_classes"),
    ("mlp", {"input_dim": 2, "hidden": [], "output_dim": 2}, "hidden"),
    ("mlp", {"input_dim": 2, "hidden": [3, -1], "output_dim": 2}, "hidden/1"),
    ("mlp", {"input_dim": 2, "hidden": [1] * 65, "output_dim": 2}, "hidden"),
    ("mlp", {"input_dim": 2, "hidden": [3], "output_dim": 2, "activation": "__import__"}, "activation"),
    ("cnn", {"input_shape": [1, 4], "channels": [2], "num_classes": 2}, "input_shape"),
    ("cnn", {"input_shape": [1, 4, 4], "channels": [2] * 3, "num_classes": 2}, ""),
    ("cnn", {"input_shape": [1, 8, 8], "channels": [3], "num_classes": 2, "groups": 2}, ""),
    ("cnn", {"input_shape": [1, 8, 8], "channels": [3], "num_classes": 2, "kernel_size": 4}, "kernel_size"),
    ("resnet9", {"num_classes": 2, "width": 6}, "width"),
    ("resnet9", {"num_classes": 2, "norm": "layer"}, "norm"),
    ("transformer_lm", {**LM, "heads": 3}, ""),
    ("transformer_lm", {**LM, "depth": 10**9}, "depth"),
    ("transformer_lm", {**LM, "positions": "rotary"}, "positions"),
]


@pytest.mark.parametrize(("name", "arguments", "field"), REFUSED)
def test_impossible_arguments_are_refused_with_a_pointer(name: str, arguments: dict, field: str) -> None:
    with pytest.raises(ArchitectureArgumentsError) as caught:
        skeleton(ArchitectureSpec(name=name, arguments=arguments))
    assert caught.value.pointer == "/architecture/arguments" + (f"/{field}" if field else "")


def test_absurd_sizes_are_refused_without_being_allocated() -> None:
    arguments = {"input_dim": 262_144, "hidden": [262_144] * 8, "output_dim": 1_000_000}
    with pytest.raises(ArchitectureArgumentsError, match="parameters are more than"):
        skeleton(ArchitectureSpec(name="mlp", arguments=arguments))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_weight_counts_once_towards_the_limit(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ArchitectureSpec(name="transformer_lm", arguments={**LM, "tied": tied})
    count = sum(parameter.numel() for parameter in build(spec).parameters())
    monkeypatch.setattr(build_module, "MAX_PARAMETERS", count)
    skeleton(spec)
    monkeypatch.setattr(build_module, "MAX_PARAMETERS", count - 1)
    with pytest.raises(ArchitectureArgumentsError, match=f"{count:,} parameters"):
        skeleton(spec)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownArchitectureError, match="resnet9") as caught:
        build(ArchitectureSpec(name="os_system"))
    assert caught.value.pointer == "/architecture/name"


def test_every_architecture_describes_its_arguments() -> None:
    described = {entry["name"]: entry for entry in describe_architectures()}
    assert described.keys() == ARCHITECTURES.keys()
    for entry in described.values():
        assert entry["description"] and entry["kinds"] and entry["tasks"]
        assert entry["arguments"]["additionalProperties"] is False
        assert entry["arguments"]["properties"]
