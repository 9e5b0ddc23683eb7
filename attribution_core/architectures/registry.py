"""Which architectures exist, what their arguments mean, and where their builders are; free of torch."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from attribution_core.architectures import arguments as schemas
from attribution_core.errors import ArchitectureArgumentsError
from attribution_core.pointers import pointer_to, steps_into
from attribution_core.spec import ArchitectureSpec, Spec

ENTRY_POINT_GROUP = "headwater.architectures"


@dataclass(frozen=True)
class Architecture:
    """One entry of the allow-list.

    Attributes:
        builder: `module:function` that takes the arguments model and returns the module.
        kinds: kinds of data sets it can read.
        tasks: types of tasks it can be trained for.
        extra: the distribution's extra it needs, if any.
    """

    arguments: type[Spec]
    builder: str
    kinds: tuple[str, ...]
    tasks: tuple[str, ...]
    extra: str | None = None


_VECTORS = ("tensor", "tabular", "image")
_BOTH = ("classification", "regression")
_HERE = "attribution_core.architectures"
ARCHITECTURES: dict[str, Architecture] = {
    "linear": Architecture(schemas.LinearArguments, f"{_HERE}.linear:linear", _VECTORS, _BOTH),
    "logistic": Architecture(schemas.LogisticArguments, f"{_HERE}.linear:logistic", _VECTORS, ("classification",)),
    "mlp": Architecture(schemas.MlpArguments, f"{_HERE}.mlp:mlp", _VECTORS, _BOTH),
    "cnn": Architecture(schemas.CnnArguments, f"{_HERE}.cnn:cnn", ("image", "tensor"), _BOTH),
    "resnet9": Architecture(schemas.Resnet9Arguments, f"{_HERE}.resnet:resnet9", ("image", "tensor"), _BOTH),
    "transformer_lm": Architecture(
        schemas.TransformerLmArguments, f"{_HERE}.transformer:transformer_lm", ("tokens", "text"), ("causal_lm",)
    ),
    "hf_causal_lm": Architecture(
        schemas.HuggingFaceArguments, f"{_HERE}.huggingface:causal_lm", ("tokens", "text"), ("causal_lm",), "hf"
    ),
    "hf_sequence_classifier": Architecture(
        schemas.HuggingFaceArguments, f"{_HERE}.huggingface:sequence_classifier", ("tokens", "text"), _BOTH, "hf"
    ),
}


def describe_architectures() -> list[dict[str, Any]]:
    """Return every built-in architecture with the JSON Schema of its arguments."""
    return [
        {
            "name": name,
            "description": (entry.arguments.__doc__ or "").strip(),
            "arguments": entry.arguments.model_json_schema(),
            "kinds": list(entry.kinds),
            "tasks": list(entry.tasks),
            "extra": entry.extra,
        }
        for name, entry in ARCHITECTURES.items()
    ]


def parse_arguments(spec: ArchitectureSpec) -> Spec:
    """Return the validated arguments of a built-in architecture.

    Raises:
        ArchitectureArgumentsError: if they do not fit its schema; the pointer names the field.
    """
    try:
        return ARCHITECTURES[spec.name].arguments.model_validate(spec.arguments)
    except ValidationError as error:
        raise refused_arguments(spec, error) from None


def refused_arguments(spec: ArchitectureSpec, error: ValidationError) -> ArchitectureArgumentsError:
    """Return what to raise for arguments that do not fit: the first mistake, with a pointer to it."""
    first = error.errors(include_url=False, include_context=False)[0]
    inside = steps_into(spec.arguments, first) if "arguments" in spec.model_fields_set else ()
    named = f"{first['loc'][-1]}: " if first["type"] == "missing" else ""
    return ArchitectureArgumentsError(
        f"{spec.name}: {named}{first['msg']}", pointer_to(("architecture", "arguments", *inside))
    )
