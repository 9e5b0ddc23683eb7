"""Values of queries that a model cannot take, refused before it runs on all of them as one batch."""

from typing import Any

from attribution_core.architectures.registry import ARCHITECTURES
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.fit_spec import FitSpec


def check_values(spec: FitSpec, batch: Batch, number: int, query: dict[str, Any]) -> None:
    """Refuse tokens beyond the model's vocabulary and targets that are none of its classes, where the request has them.

    Raises:
        InvalidInputError: with the pointer.
    """
    arguments = spec.architecture.arguments if spec.architecture.name in ARCHITECTURES else {}
    vocabulary = arguments.get("vocab_size", (arguments.get("config") or {}).get("vocab_size"))
    classes = arguments.get("num_classes", arguments.get("output_dim")) if spec.task.type == "classification" else None
    if vocabulary is not None and batch.mask is not None:
        beyond = (batch.inputs >= vocabulary) & batch.mask
        if bool(beyond.any()):
            raise InvalidInputError(
                f"token {int(batch.inputs[beyond][0])} is beyond the model's vocabulary of {vocabulary:,}",
                _place_of_value(query, number, int(beyond.any(1).nonzero()[0]), "input"),
            )
    if classes is not None and batch.targets is not None:
        outside = ((batch.targets < 0) | (batch.targets >= classes)).nonzero()
        if len(outside):
            place = int(outside[0, 0])
            raise InvalidInputError(
                f"target {int(batch.targets[place])} is not one of the model's classes 0 … {classes - 1}",
                _place_of_value(query, number, place, "target"),
            )


def _place_of_value(query: dict[str, Any], number: int, place: int, field: str) -> str:
    return f"/queries/{number}/example/{field}" if "example" in query else f"/queries/{number}/rows/{place}"
