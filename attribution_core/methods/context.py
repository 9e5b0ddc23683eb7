"""From specs and files to loaded checkpoints with a method on each; shared by fitting and answering."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from attribution_core.checkpoints import load_model
from attribution_core.curvature import EkfacFactors
from attribution_core.data.collate import ExampleSource
from attribution_core.data.reader import DatasetReader
from attribution_core.data.tokenizers import load_tokenizer
from attribution_core.errors import CorruptArtifactError, FingerprintMismatchError, InvalidInputError
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef, FitSpec
from attribution_core.methods.base import CheckedCapture, Checkpoint, FeatureMethod
from attribution_core.methods.ekfac import Ekfac
from attribution_core.methods.exact import Exact
from attribution_core.methods.grad_cos import GradCos
from attribution_core.methods.grad_dot import GradDot
from attribution_core.methods.representation import Representation
from attribution_core.methods.trak import Trak
from attribution_core.projection import Projection, build_projection
from attribution_core.spec import (
    DatasetSpec,
    EkfacMethod,
    ExactMethod,
    GradCosMethod,
    GradDotMethod,
    ProjectionSpec,
    RepresentationMethod,
    TrakMethod,
)
from attribution_core.tasks import build_task

Arrays = Mapping[str, np.ndarray]
_BATCH_BYTES = 128 << 20
_MAX_BATCH = 256


class FitContext:
    """Loads what a `FitSpec` names, once, and builds methods on its checkpoints.

    Raises:
        InvalidInputError: if the task has no such measurement.
        FingerprintMismatchError: if the data set is not the one named.
    """

    def __init__(self, spec: FitSpec, device: str = "cpu") -> None:
        self.spec = spec
        self.device = device
        self.task = build_task(spec.task)
        if spec.measurement not in self.task.measurements:
            known = ", ".join(self.task.measurements)
            raise InvalidInputError(
                f"{spec.task.type} has no measurement {spec.measurement!r}; it has {known}", "/measurement"
            )
        self.source = self.source_of(spec.dataset.folder, spec.dataset.spec)
        if self.source.reader.num_examples != spec.dataset.num_examples:
            raise FingerprintMismatchError(
                f"data set {spec.dataset.id} has {self.source.reader.num_examples} examples, not {spec.dataset.num_examples}"
            )
        self._checkpoints: dict[int, Checkpoint] = {}

    def source_of(self, folder: Path, dataset: DatasetSpec) -> ExampleSource:
        """Return batches of a data set as this model takes them."""
        tokenizer = load_tokenizer(self.spec.tokenizer, self.spec.tokenizer_path) if self.spec.tokenizer else None
        return ExampleSource(DatasetReader(folder, dataset), self.spec.task, tokenizer, self.device)

    def checkpoint(self, number: int) -> Checkpoint:
        """Return one loaded checkpoint.

        Raises:
            CorruptArtifactError: if its file is missing.
            FingerprintMismatchError: if its file holds other weights than the spec names.
            CheckpointError: if the weights do not fit the architecture.
        """
        if number not in self._checkpoints:
            reference = self.spec.checkpoints[number]
            _check_weights(reference)
            module = load_model(self.spec.architecture, reference.path, self.device)
            self._checkpoints[number] = Checkpoint(
                module=module,
                task=self.task,
                measurement=self.spec.measurement,
                num_examples=self.spec.dataset.num_examples,
                capture=CheckedCapture(module, self.spec.layers),
            )
        return self._checkpoints[number]

    def batch_size(self, number: int) -> int:
        """Return how many examples go through at once: bounded by the memory of their gradients, not by n."""
        if self.spec.batch_size is not None:
            return self.spec.batch_size
        bytes_each = 4 * self.checkpoint(number).capture.num_parameters
        return max(1, min(_MAX_BATCH, _BATCH_BYTES // bytes_each))

    def method(self, number: int, fitted: Arrays) -> FeatureMethod:
        """Return the method on one checkpoint; `fitted` holds its arrays under `<number>.<name>`, as far as they exist."""
        checkpoint, spec = self.checkpoint(number), self.spec.method
        own = {name.split(".", 1)[1]: value for name, value in fitted.items() if name.startswith(f"{number}.")}
        match spec:
            case TrakMethod():
                return Trak(checkpoint, _projection(spec.projection, number), own or None)
            case EkfacMethod():
                factors = EkfacFactors.from_arrays(checkpoint.capture.blocks, own, self.device)
                return Ekfac(checkpoint, _projection(spec.projection, number), factors, spec.damping)
            case GradDotMethod():
                return GradDot(checkpoint, _projection(spec.projection, number))
            case GradCosMethod():
                return GradCos(checkpoint, _projection(spec.projection, number))
            case RepresentationMethod():
                return Representation(checkpoint, spec.similarity)
            case ExactMethod():
                everything = np.arange(self.spec.dataset.num_examples)
                return Exact(checkpoint, spec, partial(self.source.batches, everything, self.batch_size(number)))


def _check_weights(reference: CheckpointRef) -> None:
    try:
        found = sha256_file(reference.path)
    except OSError as error:
        raise CorruptArtifactError(f"checkpoint {reference.id} cannot be read: {error.strerror}") from error
    if found != reference.sha256:
        raise FingerprintMismatchError(f"the weights of checkpoint {reference.id} are not those it was registered with")


def _projection(spec: ProjectionSpec, number: int) -> Projection:
    """Return a projection of its own for each checkpoint: their errors then average out over an ensemble."""
    return build_projection(spec.model_copy(update={"seed": spec.seed + (number << 32)}))
