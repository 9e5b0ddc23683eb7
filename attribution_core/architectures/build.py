"""From an architecture spec to a module: the built-in ones, and those that installed packages add.

An outside package adds an architecture by an entry point in the group `headwater.architectures`, a callable
`(**arguments) -> nn.Module`; its JSON Schema is read off the signature.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from torch import nn

from attribution_core.architectures.registry import ARCHITECTURES, ENTRY_POINT_GROUP, parse_arguments, refused_arguments
from attribution_core.errors import ArchitectureArgumentsError, UnknownArchitectureError
from attribution_core.spec import ArchitectureSpec

MAX_PARAMETERS = 20_000_000_000
Builder = Callable[..., nn.Module]


def build(spec: ArchitectureSpec) -> nn.Module:
    """Return the module, freshly initialised, in eval mode.

    Raises:
        UnknownArchitectureError: if the name is not on the allow-list.
        ArchitectureArgumentsError: if the arguments do not fit.
    """
    if spec.name in ARCHITECTURES:
        parsed = parse_arguments(spec)
        module_name, function = ARCHITECTURES[spec.name].builder.split(":")
        return _built(spec.name, lambda: getattr(import_module(module_name), function)(parsed))
    plugin = _plugins().get(spec.name)
    if plugin is None:
        known = ", ".join([*ARCHITECTURES, *_plugins()])
        raise UnknownArchitectureError(f"no architecture {spec.name!r}; there are {known}", "/architecture/name")
    return _built(spec.name, lambda: plugin(**_checked(spec, plugin)))


def skeleton(spec: ArchitectureSpec) -> dict[str, dict[str, Any]]:
    """Return `{name: {"shape", "trainable", "tied_to"}}` of all that a checkpoint holds, without allocating it.

    `tied_to` is the first name of the same weight, None for most. An integer buffer is no weight and is not listed.

    Raises:
        ArchitectureArgumentsError: if the arguments do not fit, or ask for too many parameters.
    """
    with torch.device("meta"):
        module = build(spec)
    trainable = {id(parameter) for parameter in module.parameters()}
    first: dict[int, str] = {}
    shapes: dict[str, dict[str, Any]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if value.is_floating_point():
            root = first.setdefault(id(value), name)
            tied_to = None if root == name else root
            shapes[name] = {"shape": list(value.shape), "trainable": id(value) in trainable, "tied_to": tied_to}
    total = sum(math.prod(entry["shape"]) for entry in shapes.values() if entry["tied_to"] is None)
    if total > MAX_PARAMETERS:
        raise ArchitectureArgumentsError(
            f"{total:,} parameters are more than the {MAX_PARAMETERS:,} allowed", "/architecture"
        )
    return shapes


def describe_plugins() -> list[dict[str, Any]]:
    """Return the architectures that installed packages add, with the JSON Schema of their arguments."""
    return [
        {
            "name": name,
            "description": inspect.getdoc(plugin) or "",
            "arguments": _schema(name, plugin).json_schema(),
            "kinds": ["tensor", "image", "tabular", "tokens", "text"],
            "tasks": ["classification", "regression", "causal_lm"],
            "extra": None,
        }
        for name, plugin in sorted(_plugins().items())
    ]


def _built(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make().eval()
    except ArchitectureArgumentsError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        # The arguments passed their schema but not the module's constructor: still the caller's to mend.
        raise ArchitectureArgumentsError(f"{name} cannot be built: {error}", "/architecture/arguments") from error


@cache
def _plugins() -> dict[str, Builder]:
    return {
        point.name: point.load() for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in ARCHITECTURES
    }


def _schema(name: str, plugin: Builder) -> TypeAdapter[Any]:
    fields: dict[str, Any] = {
        parameter.name: (
            Any if parameter.annotation is parameter.empty else parameter.annotation,
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(plugin, eval_str=True).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    return TypeAdapter(create_model(name, __config__=ConfigDict(extra="forbid"), **fields))


def _checked(spec: ArchitectureSpec, plugin: Builder) -> dict[str, Any]:
    try:
        parsed = _schema(spec.name, plugin).validate_python(spec.arguments)
    except ValidationError as error:
        raise refused_arguments(spec, error) from None
    return {field: getattr(parsed, field) for field in type(parsed).model_fields}
