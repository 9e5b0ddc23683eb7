"""The training set as tensors: in memory where it fits, else read for every batch."""

import numpy as np
import torch
from torch import Tensor

from attribution_core.data.batch import Batch
from attribution_core.data.collate import ExampleSource
from attribution_core.data.reader import ROW_GROUP_SIZE, DatasetReader
from attribution_core.data.tokenizers import load_tokenizer
from attribution_core.errors import FingerprintMismatchError
from attribution_core.tasks import Task
from attribution_core.training.spec import TrainSpec

MAX_RESIDENT_BYTES = 1 << 30


class TrainingData:
    """Batches of a training set by row number, floats in one dtype.

    Up to 1 GiB of tensors (`MAX_RESIDENT_BYTES`) is kept in memory, tokens padded to the longest example; a larger set is read anew for
    every batch, tokens padded to the batch's longest. Masks make both the same up to rounding.

    Attributes:
        rows: those that are trained on.
    """

    def __init__(self, source: ExampleSource, rows: np.ndarray, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.rows, self.dtype = source, rows, dtype
        self._resident = self._read_all()

    @classmethod
    def of(cls, spec: TrainSpec, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "TrainingData":
        """Return a training's data.

        Raises:
            FingerprintMismatchError: if the data set is not the one named.
        """
        tokenizer = load_tokenizer(spec.tokenizer, spec.tokenizer_path) if spec.tokenizer else None
        reader = DatasetReader(spec.dataset.folder, spec.dataset.spec)
        if reader.num_examples != spec.dataset.num_examples:
            raise FingerprintMismatchError(
                f"data set {spec.dataset.id} has {reader.num_examples} examples, not {spec.dataset.num_examples}"
            )
        return cls(ExampleSource(reader, spec.task, tokenizer, device), spec.training_rows, dtype)

    def __len__(self) -> int:
        return self.source.reader.num_examples

    def batch(self, rows: np.ndarray) -> Batch:
        """Return some rows (…, batch), in fields (…, batch, …)."""
        if self._resident is not None:
            return self._resident[torch.from_numpy(rows).to(self._resident.rows.device)]
        flat = self.source.batch(rows.ravel()).to(self.dtype)
        return _reshaped(flat, rows.shape)

    def check(self, task: Task, output: Tensor) -> None:
        """Refuse targets that do not fit an output (1, …) of the model; those of examples that are left out may be anything.

        Raises:
            InvalidInputError: naming what is impossible.
        """
        for start in range(0, len(self.rows), ROW_GROUP_SIZE):
            part = self.batch(self.rows[start : start + ROW_GROUP_SIZE])
            task.check(output.expand(len(part), *output.shape[1:]), part)

    def _read_all(self) -> Batch | None:
        parts, size = [], 0
        for start in range(0, len(self), ROW_GROUP_SIZE):
            part = self.source.batch(np.arange(start, min(start + ROW_GROUP_SIZE, len(self)))).to(self.dtype)
            parts.append(part)
            size += part.inputs.nbytes
            if size > MAX_RESIDENT_BYTES:
                return None
        return Batch.joined(parts)


def _reshaped(flat: Batch, shape: tuple[int, ...]) -> Batch:
    return Batch(
        rows=flat.rows.reshape(shape),
        inputs=flat.inputs.reshape(*shape, *flat.inputs.shape[1:]),
        targets=None if flat.targets is None else flat.targets.reshape(*shape, *flat.targets.shape[1:]),
        mask=None if flat.mask is None else flat.mask.reshape(*shape, *flat.mask.shape[1:]),
    )
