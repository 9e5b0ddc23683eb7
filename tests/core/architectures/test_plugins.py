"""Architectures that installed packages add by entry points."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Literal

import pytest
from torch import nn

from attribution_core.architectures import build as build_module
from attribution_core.architectures.build import build, describe_plugins, skeleton
from attribution_core.errors import ArchitectureArgumentsError
from attribution_core.spec import ArchitectureSpec


def wide(width: int, activation: Literal["relu", "tanh"] = "relu", **options: bool) -> nn.Module:
    """One wide layer."""
    if width > 100:
        raise ValueError("too wide")
    return nn.Sequential(nn.Linear(2, width), nn.ReLU() if activation == "relu" else nn.Tanh())


def shadow() -> nn.Module:
    return nn.Linear(1, 1)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def entry_points(*, group: str) -> list[EntryPoint]:
        assert group == "headwater.architectures"
        here = __name__
        return [EntryPoint("wide", f"{here}:wide", group), EntryPoint("mlp", f"{here}:shadow", group)]

    monkeypatch.setattr(build_module, "entry_points", entry_points)
    build_module._plugins.cache_clear()
    yield
    build_module._plugins.cache_clear()


def test_the_schema_is_read_off_the_signature() -> None:
    (entry,) = describe_plugins()
    assert (entry["name"], entry["description"]) == ("wide", "One wide layer.")
    schema = entry["arguments"]
    assert schema["properties"].keys() == {"width", "activation"}
    assert schema["required"] == ["width"]
    assert schema["properties"]["width"]["type"] == "integer"
    assert schema["additionalProperties"] is False


def test_a_plugin_is_built_with_its_arguments() -> None:
    spec = ArchitectureSpec(name="wide", arguments={"width": 3, "activation": "tanh"})
    module = build(spec)
    assert isinstance(module[1], nn.Tanh) and not module.training
    assert {name: entry["shape"] for name, entry in skeleton(spec).items()} == {"0.weight": [3, 2], "0.bias": [3]}


@pytest.mark.parametrize(
    ("arguments", "pointer"),
    [
        ({}, "/architecture/arguments/width"),
        ({"width": "x"}, "/architecture/arguments/width"),
        ({"width": 3, "activation": "gelu"}, "/architecture/arguments/activation"),
        ({"width": 3, "other": True}, "/architecture/arguments/other"),
        ({"width": 101}, "/architecture/arguments"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, pointer: str) -> None:
    with pytest.raises(ArchitectureArgumentsError) as caught:
        build(ArchitectureSpec(name="wide", arguments=arguments))
    assert caught.value.pointer == pointer


def test_a_plugin_cannot_take_the_name_of_a_built_in() -> None:
    arguments = {"input_dim": 2, "hidden": [3], "output_dim": 2}
    assert "hidden_0" in dict(build(ArchitectureSpec(name="mlp", arguments=arguments)).named_modules())
