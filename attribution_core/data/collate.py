"""From examples to batches: images scaled, tokens padded and masked, targets typed."""

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution_core.data.batch import Batch
from attribution_core.data.content import as_array, as_png, as_target, as_text, as_tokens
from attribution_core.data.reader import DatasetReader, Examples, decoded_png
from attribution_core.data.tokenizers import Tokenizer
from attribution_core.errors import InvalidInputError
from attribution_core.spec import CausalLanguageModelingTask, ClassificationTask, DatasetSpec, RegressionTask


@dataclass(frozen=True)
class ExampleSource:
    """Batches of one data set for one task.

    Attributes:
        reader: the data set.
        task: decides the targets' type.
        tokenizer: for text.
        device: where batches are put.
    """

    reader: DatasetReader
    task: ClassificationTask | RegressionTask | CausalLanguageModelingTask
    tokenizer: Tokenizer | None = None
    device: str = "cpu"

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Return the given rows."""
        return self.collate(self.reader.read(rows))

    def batches(self, rows: np.ndarray, size: int) -> Iterator[Batch]:
        """Yield the given rows in order, `size` at a time."""
        for start in range(0, len(rows), size):
            yield self.batch(rows[start : start + size])

    def inline(self, examples: Sequence[dict[str, Any]], first: int = 0) -> Batch:
        """Return examples given as JSON values: base64 images, number lists, tokens, text, or a map of features.

        Args:
            examples: `{"input", "target"}` each.
            first: place of the first among all of the caller's queries, for pointers.

        Raises:
            InvalidInputError: with a pointer to the value that does not fit the data set's spec.
        """
        spec, inputs, given = self.reader.spec, [], []
        for number, example in enumerate(examples, first):
            try:
                inputs.append(_inline_input(example["input"], spec, self.reader.input_shape))
            except InvalidInputError as error:
                raise InvalidInputError(str(error), f"/queries/{number}/example/input") from None
            try:
                given.append(None if example.get("target") is None else as_target(example["target"]))
            except InvalidInputError as error:
                raise InvalidInputError(str(error), f"/queries/{number}/example/target") from None
        targets = None if any(target is None for target in given) else given
        missing = np.full(len(inputs), -1, dtype=np.int64)
        return self.collate(Examples(missing, [""] * len(inputs), inputs, targets, [{}] * len(inputs)))

    def collate(self, examples: Examples) -> Batch:
        """Turn examples into tensors."""
        inputs, mask = self._inputs(examples.inputs)
        return Batch(
            rows=torch.from_numpy(examples.rows).to(self.device),
            inputs=inputs.to(self.device),
            targets=self._targets(examples.targets),
            mask=None if mask is None else mask.to(self.device),
        )

    def _inputs(self, values: list[Any]) -> tuple[Tensor, Tensor | None]:
        spec = self.reader.spec
        if spec.kind == "image":
            return _images(values, spec), None
        if spec.kind in ("tensor", "tabular"):
            return torch.from_numpy(_stacked(values)), None
        if spec.kind == "text":
            if self.tokenizer is None:
                raise InvalidInputError("a text data set needs a model with a tokenizer", "/model")
            values = [self.tokenizer.encode(text) for text in values]
        cut = [tokens[: spec.max_length] for tokens in values]
        return _padded(cut, self.tokenizer.pad if self.tokenizer else 0)

    def _targets(self, values: list[Any] | None) -> Tensor | None:
        if values is None or isinstance(self.task, CausalLanguageModelingTask):
            return None
        if any(value is None for value in values):
            raise InvalidInputError("some of these examples have no target")
        wanted = torch.int64 if isinstance(self.task, ClassificationTask) else torch.float32
        try:
            targets = torch.as_tensor(np.asarray(values))
        except (TypeError, ValueError):
            raise InvalidInputError("the targets are not numbers of one shape") from None
        if wanted == torch.int64 and targets.is_floating_point() and not bool((targets == targets.round()).all()):
            raise InvalidInputError("classification needs whole numbers as targets")
        return targets.to(self.device, wanted)


def _images(values: list[np.ndarray], spec: DatasetSpec) -> Tensor:
    pixels = torch.from_numpy(_stacked(values)).permute(0, 3, 1, 2).float() / 255  # (batch, channels, height, width)
    if spec.normalize is None:
        return pixels.contiguous()
    mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in (spec.normalize.mean, spec.normalize.std))
    if mean.shape[1] != pixels.shape[1]:
        raise InvalidInputError(
            f"normalize has {mean.shape[1]} channels and the images have {pixels.shape[1]}", "/normalize"
        )
    return (pixels - mean) / std


def _stacked(values: list[np.ndarray]) -> np.ndarray:
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
        raise InvalidInputError(f"the inputs have different shapes: {sorted(map(list, shapes))[:5]}")
    return np.stack(values)


def _padded(sequences: list[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(tokens) for tokens in sequences)
    inputs = torch.full((len(sequences), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for number, tokens in enumerate(sequences):
        inputs[number, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        mask[number, : len(tokens)] = True
    return inputs, mask


def _inline_input(value: Any, spec: DatasetSpec, shape: list[int] | None) -> Any:
    match spec.kind:
        case "image":
            if isinstance(value, str):
                try:
                    value = base64.b64decode(value, validate=True)
                except (binascii.Error, ValueError):
                    raise InvalidInputError("the image is not base64") from None
            pixels = decoded_png(as_png(value, spec))
            return _shaped(pixels, None if shape is None else [shape[1], shape[2], shape[0]])
        case "tabular":
            if isinstance(value, dict):
                value = _features(value, spec)
            return _shaped(as_array(value), shape)
        case "tensor":
            return _shaped(as_array(value), shape)
        case "tokens":
            return as_tokens(value)
        case _:
            return as_text(value)


def _features(value: dict[str, Any], spec: DatasetSpec) -> list[Any]:
    if not isinstance(spec.input, list):
        raise InvalidInputError("this data set's features have no names; give a list of numbers")
    if set(value) != set(spec.input):
        raise InvalidInputError(f"the features must be exactly {', '.join(spec.input)}")
    return [value[name] for name in spec.input]


def _shaped(value: np.ndarray, shape: list[int] | None) -> np.ndarray:
    if shape is not None and list(value.shape) != shape:
        raise InvalidInputError(f"the input has shape {list(value.shape)}, the data set's have {shape}")
    return value
