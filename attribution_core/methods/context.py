"""From specs and files to loaded checkpoints with a method on each; shared by fitting and answering."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from attribution_core.checkpoints import load_model
from attribution_core.curvature import EkfacFactors
from attribution_core.curvature.fisher import Observed, Tempering, observe
from attribution_core.data.batch import Batch
from attribution_core.data.collate import ExampleSource
from attribution_core.data.reader import DatasetReader
from attribution_core.data.tokenizers import load_tokenizer
from attribution_core.errors import FingerprintMismatchError, InvalidInputError
from attribution_core.features.factors import numbers_kept
from attribution_core.features.rows import RowType
from attribution_core.fit_spec import FitSpec, Member
from attribution_core.gradients.self_check import check_capture
from attribution_core.method_spec import (
    DEFAULT_BITS,
    DEFAULT_DIM,
    EkfacMethod,
    ExactMethod,
    FisherMethod,
    GasMethod,
    GaussNewtonMethod,
    GradCosMethod,
    GradientMethodBase,
    KfacMethod,
    LograMethod,
    RepresentationMethod,
    RepresenterMethod,
    SourceMethod,
    TrakMethod,
)
from attribution_core.methods import trak
from attribution_core.methods.base import CheckedCapture, Checkpoint, FeatureMethod, GradientMethod
from attribution_core.methods.copies import put_weights
from attribution_core.methods.curvatures import Curvatures
from attribution_core.methods.defaults import Defaults
from attribution_core.methods.exact import Exact
from attribution_core.methods.fitted import TEMPERING, TURNED, WHITENED, of_checkpoint
from attribution_core.methods.grad_cos import GradCos
from attribution_core.methods.linear_head import last_linear
from attribution_core.methods.logra import Logra
from attribution_core.methods.pseudo_gradients import PseudoGradients
from attribution_core.methods.representation import Representation
from attribution_core.methods.representer import Representer
from attribution_core.methods.source import Source, Unrolled
from attribution_core.methods.trak import Trak
from attribution_core.perturbation import perturb
from attribution_core.projection import FactoredProjection, Projection, build_projection
from attribution_core.sampling import evenly_spread
from attribution_core.spec import DatasetSpec
from attribution_core.tasks import build_task

Arrays = Mapping[str, np.ndarray]
MAX_FACTORED_EXAMPLES = 100_000
MAX_FACTOR_BYTES = 16 << 10
FACTOR_BYTES = {"auto": 4, "float32": 4, "float16": 2, "int8": 1}
_BATCH_BYTES = 48 << 20
_MAX_BATCH = 512
# A language model's outputs are as large as its vocabulary, and its loss has several copies of them.
_OUTPUT_BYTES = 512 << 20
_OUTPUT_COPIES = 4
# Whole gradients held at once: of the queries by which recall is measured, as they are, divided by n and preconditioned.
MAX_GRADIENT_BYTES = 8 << 30
RECALL_QUERIES = 16
_GRADIENTS_HELD = 3 * RECALL_QUERIES
_PROBED = 8
# Examples on which captured gradients are compared with autograd.
_COMPARED = 3
_LOWERED = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Probe:
    """A few training examples under one checkpoint, from which sizes are told.

    Attributes:
        output_bytes: of the model's output for one example.
    """

    observed: Observed
    output_bytes: int

    @cached_property
    def kept_bytes(self) -> int:
        """Bytes of one example's gradients and draws in the form that they are kept in."""
        return self.observed.compact().nbytes // len(self.observed)


class FitContext:
    """Loads what a `FitSpec` names, once, and builds methods on its checkpoints.

    Raises:
        InvalidInputError: if the task has no such measurement, or the checkpoints do not say what the method needs.
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
        spec.check_trajectory()
        spec.check_store()
        spec.check_projection()
        spec.check_head()
        self.source = self.source_of(spec.dataset.folder, spec.dataset.spec)
        if self.source.reader.num_examples != spec.dataset.num_examples:
            raise FingerprintMismatchError(
                f"data set {spec.dataset.id} has {self.source.reader.num_examples} examples, not {spec.dataset.num_examples}"
            )
        # The rows that are trained on, ascending.
        self.training_rows = np.setdiff1d(np.arange(spec.dataset.num_examples), np.asarray(spec.left_out, np.int64))
        self._checkpoints: dict[int, Checkpoint] = {}
        self._probes: dict[int, _Probe] = {}
        self._captures_rightly = False
        # Where trained copies' weights are, as `<member>.weights.<parameter>`; a fit or an index that has them says so.
        self.copy_weights: Callable[[], Arrays] = dict
        self.pseudo_gradients = PseudoGradients(self)
        self.curvatures = Curvatures(self)
        self.defaults = Defaults(self)

    def source_of(self, folder: Path, dataset: DatasetSpec) -> ExampleSource:
        """Return batches of a data set as this model takes them."""
        tokenizer = load_tokenizer(self.spec.tokenizer, self.spec.tokenizer_path) if self.spec.tokenizer else None
        return ExampleSource(DatasetReader(folder, dataset), self.spec.task, tokenizer, self.device)

    def checkpoint(self, number: int) -> Checkpoint:
        """Return one member's loaded checkpoint, or perturbed copy of it.

        Raises:
            CorruptArtifactError: if its file is missing.
            FingerprintMismatchError: if its file holds other weights than the spec names.
            CheckpointError: if the weights do not fit the architecture.
            InvalidInputError: if a layer cannot be attributed, or the method's gradients would not fit in memory.
        """
        if number not in self._checkpoints:
            module = self._module(number)
            # The name of a model that is one layer is empty.
            last = isinstance(self.spec.method, RepresenterMethod) and last_linear(module)[0]
            capture = CheckedCapture(module, [last] if last else self.spec.layers, _LOWERED[self.spec.precision])
            self._check_size(capture.num_parameters)
            self._checkpoints[number] = Checkpoint(
                module=module,
                task=self.task,
                measurement=self.spec.measurement,
                num_examples=self.spec.num_training,
                capture=capture,
            )
        return self._checkpoints[number]

    def _module(self, number: int) -> nn.Module:
        member = self.spec.members[number]
        if not member.copy:
            return self._loaded(member)
        if not self.spec.method.trains_copies:
            return self.noisy(member)
        module = self._loaded(member)
        put_weights(module, of_checkpoint(self.copy_weights(), number))
        return module

    def noisy(self, member: Member) -> nn.Module:
        """Return a perturbed copy, newly made, before any training."""
        module, perturbation = self._loaded(member), self.spec.perturbation
        assert perturbation is not None
        perturb(module, perturbation, member.checkpoint.sha256, member.copy)
        return module

    def _loaded(self, member: Member) -> nn.Module:
        member.checkpoint.verify()
        return load_model(self.spec.architecture, member.checkpoint.path, self.device)

    def check_capture(self, number: int) -> None:
        """Refuse layers whose gradients cannot be captured, as told by one checkpoint from a few examples; others have the same layers.

        Raises:
            UnsupportedLayerError: naming them.
            InvalidInputError: if the examples do not fit the model.
        """
        if self._captures_rightly or not isinstance(self.spec.method, GradientMethodBase):
            return
        checkpoint, batch = self.checkpoint(number), self.source.batch(self.training_rows[:_COMPARED])
        check_capture(checkpoint.capture, partial(checkpoint.run, batch))
        self._captures_rightly = True

    def batch_size(self, number: int) -> int:
        """Return how many examples go through at once: bounded by the memory of their gradients, not by n."""
        if self.spec.batch_size is not None:
            return self.spec.batch_size
        probe = self._probe(number)
        # A batch may take what the model itself takes.
        model = 4 * sum(value.numel() for value in self.checkpoint(number).module.parameters())
        bytes_each = probe.observed.nbytes // len(probe.observed)
        outputs = max(1, _OUTPUT_BYTES // (_OUTPUT_COPIES * probe.output_bytes))
        gradients = probe.observed.training
        if self.layout == "vectors" or not all(gradient.rank_one for gradient in gradients):
            bytes_each += 4 * max(gradient.block.numel for gradient in gradients)
        return max(1, min(_MAX_BATCH, outputs, max(_BATCH_BYTES, model) // bytes_each))

    @cached_property
    def layout(self) -> Literal["vectors", "factors"]:
        """How training gradients are kept; `auto` measures one example.

        Raises:
            InvalidInputError: if factors are asked for of a method that compares something else.
        """
        asked, method = self.spec.store.layout, self.spec.method
        possible = self._compares_whole_gradients
        if asked == "factors" and not possible:
            raise InvalidInputError(f"{method.type} keeps vectors, not factors", "/store/layout")
        if asked != "auto":
            return asked
        # An extension keeps the layout of the fit it extends.
        large = self.spec.fitted_examples > MAX_FACTORED_EXAMPLES
        width = FACTOR_BYTES.get(self.spec.store.dtype)
        if not possible or large or width is None or self.spec.search.type != "flat":
            return "vectors"
        return "factors" if numbers_kept(self._probe(0).observed.training) * width <= MAX_FACTOR_BYTES else "vectors"

    @property
    def _compares_whole_gradients(self) -> bool:
        method = self.spec.method
        return isinstance(method, GradientMethodBase) and not isinstance(
            method, TrakMethod | LograMethod | GradCosMethod | GasMethod
        )

    def _check_size(self, parameters: int) -> None:
        """Refuse a method that would hold more whole gradients than fit."""
        size = 4 * _GRADIENTS_HELD * parameters
        if self._compares_whole_gradients and size > MAX_GRADIENT_BYTES:
            raise InvalidInputError(
                f"{self.spec.method.type} holds whole gradients of its queries: {size >> 30} GiB for {parameters:,} parameters. Attribute fewer "
                "layers, by names or patterns, or use logra, whose gradients are never formed",
                "/layers",
            )

    def method(self, number: int, fitted: Arrays) -> FeatureMethod:
        """Return the method on one checkpoint; `fitted` holds its arrays under `<number>.<name>`, as far as they exist."""
        checkpoint, spec = self.checkpoint(number), self.spec.method
        own = of_checkpoint(fitted, number)
        tempering = Tempering(*own[TEMPERING].tolist()) if TEMPERING in own else Tempering()
        match spec:
            case RepresentationMethod():
                return Representation(checkpoint, spec.similarity)
            case RepresenterMethod():
                return Representer(checkpoint, spec, own)
            case TrakMethod():
                kernel = trak.resized(own, self.spec.num_training / self.spec.fitted_examples) if own else None
                return Trak(checkpoint, self._projection(spec, number), kernel, spec, tempering)
            case LograMethod():
                projection = self._projection(spec, number)
                assert isinstance(projection, FactoredProjection)
                return Logra(checkpoint, projection, own or None)
            case GradCosMethod():
                return GradCos(checkpoint, self._projection(spec, number))
            case GasMethod():
                return GradCos(checkpoint, self._projection(spec, number), self.share(number))
            case SourceMethod():
                return self._source(spec, number, fitted)
            case ExactMethod():
                return Exact(checkpoint, spec, partial(self.batches, number))
        assert isinstance(spec, GradientMethodBase)
        kept = self._projection(spec, number) if self.layout == "vectors" else None
        damping, whitened_at = (
            self.defaults.damping(fitted) or 0.0,
            float(own[WHITENED][0]) if WHITENED in own else None,
        )
        curvature, turned = self.curvatures.of(number, own), TURNED in own
        return GradientMethod(checkpoint, curvature, damping, kept, whitened_at, tempering, turned=turned)

    @cached_property
    def row_type(self) -> RowType:
        """What stored numbers are: as asked for, else one bit each where whitened rows are searched exhaustively (docs/studies/stores.md)."""
        asked = self.spec.store.dtype
        if asked != "auto":
            return asked
        return "binary" if self.whitens and self.spec.search.type == "flat" else "float32"

    @cached_property
    def row_size(self) -> int:
        """Numbers that are kept of one checkpoint, where rows are projections."""
        assert isinstance(self.spec.method, GradientMethodBase)
        return self._projection(self.spec.method, 0).dim

    @property
    def lossy(self) -> bool:
        """Whether stored numbers differ from those computed by more than rounding."""
        return self.row_type in ("int8", "binary")

    @property
    def whitens(self) -> bool:
        """Whether a new fit's rows are whitened: a factored projection never forms what would be, and without damping it may be singular."""
        method = self.spec.method
        return (
            isinstance(method, FisherMethod)
            and self.layout == "vectors"
            and method.projection.type != "factored"
            and method.damping != 0
        )

    @property
    def turns(self) -> bool:
        """Whether a new fit's stored gradients lie along the axes of its curvature, so that solved queries need not be turned back.

        Not as bytes: along these axes few entries are large, and the rounding of all others is theirs.
        """
        solved_there = isinstance(self.spec.method, EkfacMethod | KfacMethod | GaussNewtonMethod)
        return solved_there and self.layout == "factors" and not self.lossy

    def batches(self, number: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """Yield training examples as one checkpoint takes them; all by default."""
        chosen = self.training_rows if rows is None else rows
        return self.source.batches(chosen, self.batch_size(number))

    def _source(self, spec: SourceMethod, number: int, fitted: Arrays) -> Source:
        """Return SOURCE on one checkpoint; the mean over all checkpoints is the mean over runs of sums over their segments' means."""
        runs = self.spec.segments(spec)
        (run,) = (run for run in runs if any(number in segment.checkpoints for segment in run))
        (place,) = (place for place, segment in enumerate(run) if number in segment.checkpoints)
        checkpoint = self.checkpoint(number)
        factors = [
            EkfacFactors.from_arrays(
                checkpoint.capture.blocks, of_checkpoint(fitted, segment.checkpoints[0]), self.device
            )
            for segment in run[place:]
        ]
        weight = len(self.spec.checkpoints) / (len(runs) * len(run[place].checkpoints))
        later = zip(factors, (segment.time for segment in run[place:]), strict=True)
        kept = self._projection(spec, number) if self.layout == "vectors" else None
        return Source(
            checkpoint, Unrolled(list(later), spec.l2, weight), kept, self.checkpoint(run[-1].checkpoints[-1])
        )

    def share(self, number: int) -> float:
        """Return a checkpoint's weight in a mean over all checkpoints that is the sum `Σ η_t` over each run's, averaged over runs."""
        learning_rate = self.spec.checkpoints[number].learning_rate
        assert learning_rate is not None
        return learning_rate * len(self.spec.checkpoints) / len(self.spec.runs())

    def spread(self, count: int | None) -> np.ndarray:
        """Return so many training rows, evenly spread; all by default."""
        n = self.spec.num_training
        rows: np.ndarray = self.training_rows[evenly_spread(n, count or n)]
        return rows

    def kept_bytes(self, number: int) -> int:
        """Return the bytes of one training example's gradients and draws, as one pass keeps them for the next."""
        return self._probe(number).kept_bytes

    @property
    def has_shortfalls(self) -> bool:
        """Whether examples have a `1 - p`, the probability of all but their target."""
        return self._probe(0).observed.shortfall is not None

    def _probe(self, number: int) -> _Probe:
        """Return what a few training examples tell of sizes."""
        if number not in self._probes:
            checkpoint, batch = self.checkpoint(number), self.source.batch(self.spread(_PROBED))
            run = checkpoint.run(batch)
            observed = observe(run, self.task, batch, self.spec.measurement, self.pseudo_gradients.fisher)
            self._probes[number] = _Probe(observed, max(1, run.output.nbytes // len(batch)))
        return self._probes[number]

    def _projection(self, method: GradientMethodBase, number: int) -> Projection:
        """Return a projection of its own for each checkpoint: their errors then average out over an ensemble."""
        asked = method.projection
        # Clusters are of floats, whatever rows are stored as.
        bits = self.row_type == "binary" and self.spec.search.type == "flat"
        dim = asked.dim or (DEFAULT_BITS if bits else DEFAULT_DIM)
        spec = asked.model_copy(update={"seed": asked.seed + (number << 32), "dim": dim})
        return build_projection(spec, self.checkpoint(number).capture.blocks)
