"""Everything a fit depends on, as one value: made by whoever submits it, read by whoever runs it; free of torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from attribution_core.errors import InvalidInputError
from attribution_core.fingerprint import sha256_file, sha256_of
from attribution_core.method_spec import (
    DEFAULT_SHRINKAGE,
    PROJECTION_VERSION,
    EigenvalueCorrected,
    GaussNewtonMethod,
    LograMethod,
    MethodSpec,
    Perturbation,
    PerturbedMethodBase,
    RepresenterMethod,
    SourceMethod,
    TemperedMethodBase,
)
from attribution_core.references import CheckpointRef, DatasetRef
from attribution_core.spec import (
    ArchitectureSpec,
    CausalLanguageModelingTask,
    Precision,
    SearchSpec,
    Spec,
    StoreSpec,
    TaskSpec,
    TokenizerSpec,
)
from attribution_core.training.recipe import Recipe
from attribution_core.trajectory import Point, Segment, segments

__all__ = ["BaseRef", "CheckpointRef", "DatasetRef", "FitSpec", "FitSummary", "PriorRef"]


class BaseRef(Spec):
    """An earlier fit that this one extends by new rows: its factors are kept, its stored rows reused as they are.

    Attributes:
        folder: its artifact; needed while the extension is made, not afterwards.
        fingerprint: its own.
        num_examples: rows of its data set, with which the new data set begins.
        fitted_examples: n of the fit that the factors come from.
    """

    folder: Path
    fingerprint: str
    num_examples: int = Field(ge=1)
    fitted_examples: int = Field(ge=1)


class PriorRef(Spec):
    """A fitted index whose scores another one begins with."""

    id: str
    folder: Path
    fit: "FitSpec"


@dataclass(frozen=True)
class Member:
    """One of the models that scores are averaged over.

    Attributes:
        copy: 0 is the checkpoint itself, others are its perturbed copies.
    """

    checkpoint: CheckpointRef
    copy: int


class FitSpec(Spec):
    """Everything a fit depends on; JSON in, JSON out.

    Attributes:
        checkpoints: none for methods that train by the recipe.
        recipe: how the model is trained, where the method trains it.
        initial: the checkpoint that the recipe starts from, None where the seed decides.
        queries: where the method's named queries are, their values prepared as the training set's.
        bank: files of those groups of the method's bank that are retrained already.
        priors: indexes that the method begins with.
        layers: names or patterns (`layer_names`) of the attributed layers, all by default.
        precision: of forward and backward passes; gradients, curvatures and scores are float32 in any case.
        left_out: rows of the data set that are not trained on, ascending: deleted examples. Rows keep their numbers.
        base: the fit that this one extends, if it is no fit of its own.
        shard_size: training examples per shard; changes no score beyond rounding.
        batch_size: examples per pass; by memory if None.
    """

    architecture: ArchitectureSpec
    task: TaskSpec
    tokenizer: TokenizerSpec | None = None
    tokenizer_path: Path | None = None
    dataset: DatasetRef
    checkpoints: list[CheckpointRef] = Field(max_length=256)
    recipe: Recipe | None = None
    initial: CheckpointRef | None = None
    queries: DatasetRef | None = None
    bank: dict[int, Path] = Field(default_factory=dict)
    priors: list[PriorRef] = Field(default_factory=list)
    method: MethodSpec
    measurement: str
    layers: list[str] | None = None
    precision: Precision = "float32"
    store: StoreSpec = StoreSpec()
    search: SearchSpec = SearchSpec()
    left_out: list[int] = Field(default_factory=list)
    base: BaseRef | None = None
    shard_size: int = Field(default=512, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    format: Literal[1] = 1

    @model_validator(mode="after")
    def _as_the_method_needs(self) -> Self:
        needs = self.method.needs
        if ("recipe" in needs) != (self.recipe is not None) or ("queries" in needs) != (self.queries is not None):
            raise ValueError("recipe and queries are for the methods that need them")
        if ("priors" in needs) != bool(self.priors):
            raise ValueError("priors are for the methods that need them")
        if not self.checkpoints and self.recipe is None:
            raise ValueError("checkpoints are missing")
        self.dataset.check_left_out(self.left_out)
        return self

    @property
    def num_training(self) -> int:
        """n: the rows of the data set that are trained on."""
        return self.dataset.num_examples - len(self.left_out)

    @property
    def fitted_examples(self) -> int:
        """The n of the fit that the factors come from."""
        return self.num_training if self.base is None else self.base.fitted_examples

    @property
    def num_covered(self) -> int:
        """Rows whose features an earlier fit has; those after them are computed."""
        return 0 if self.base is None else self.base.num_examples

    def fingerprint(self) -> str:
        """Return the hash of all that decides scores: weights, architecture, data, layers, method, projection, dtype."""
        decides = self.model_dump(
            mode="json",
            include={
                "architecture",
                "task",
                "tokenizer",
                "method",
                "measurement",
                "layers",
                "precision",
                "store",
                "search",
                "left_out",
                "format",
            },
        )
        weights = [self._identity(checkpoint) for checkpoint in self.checkpoints]
        tokenizer = sha256_file(self.tokenizer_path) if self.tokenizer_path else None
        # As it was before there were such choices; what an index has of either is told by its files.
        if not self.method.copies:
            decides["method"].pop("perturbation", None)
        elif decides["method"]["perturbation"]["training"] is None:
            del decides["method"]["perturbation"]["training"]
        if isinstance(self.method, TemperedMethodBase) and self.method.residual_power is None:
            del decides["method"]["residual_power"]
        if isinstance(self.method, GaussNewtonMethod) and self.method.shrinkage is None and not self.method.copies:
            decides["method"]["shrinkage"] = DEFAULT_SHRINKAGE
        if isinstance(self.method, EigenvalueCorrected):
            for name in ("axes", "whole_layers"):
                if decides["method"][name] == EigenvalueCorrected.model_fields[name].default:
                    del decides["method"][name]
        base = None if self.base is None else self.base.model_dump(mode="json", exclude={"folder"})
        data = [self.dataset.reading(), self.dataset.sha256, self.queries and self.queries.sha256]
        priors = [prior.fit.fingerprint() for prior in self.priors]
        return sha256_of([decides, data, weights, self._training(), tokenizer, base, priors, PROJECTION_VERSION])

    def runs(self) -> list[list[int]]:
        """Return the numbers of each training's checkpoints in the order of their steps."""
        runs: dict[str, list[int]] = {}
        for number, checkpoint in enumerate(self.checkpoints):
            runs.setdefault(checkpoint.run, []).append(number)
        return [sorted(numbers, key=lambda number: self.checkpoints[number].step or 0) for numbers in runs.values()]

    @property
    def members(self) -> tuple[Member, ...]:
        """The models that scores are averaged over: every checkpoint, followed by its perturbed copies."""
        copies = range(1 + self.method.copies)
        return tuple(Member(checkpoint, copy) for checkpoint in self.checkpoints for copy in copies)

    @property
    def perturbation(self) -> Perturbation | None:
        """What the copies of checkpoints are, if the method has any."""
        return self.method.perturbation if isinstance(self.method, PerturbedMethodBase) else None

    def answering(self) -> list[int]:
        """Return the members whose mean output is the index's: all checkpoints, or the ends of the trainings that a method follows."""
        if self.method.follows_training:
            return [run[-1] for run in self.runs()]
        return [number for number, member in enumerate(self.members) if member.copy == 0]

    def check_trajectory(self) -> None:
        """Refuse checkpoints that do not say what the method needs to know of the training they come from.

        Raises:
            InvalidInputError: naming a checkpoint.
        """
        method = self.method
        if not method.follows_training:
            return
        for checkpoint in self.checkpoints:
            missing = [name for name in method.checkpoint_needs if getattr(checkpoint, name) is None]
            if missing:
                raise InvalidInputError(
                    f"{method.type} needs the {missing[0]} of every checkpoint, and {checkpoint.id} has none",
                    "/checkpoints",
                )
        if isinstance(method, SourceMethod):
            self.segments(method)

    def check_store(self) -> None:
        """Refuse bits where nothing scores candidates again: a query's whole answer would come from the signs of rows.

        Raises:
            InvalidInputError: naming the type.
        """
        if self.store.dtype == "binary" and self.method.exact_rows:
            raise InvalidInputError(
                f"{self.method.type} answers from its stored rows alone, and of their signs too little is left: store int8, float16 or "
                "float32",
                "/store/dtype",
            )

    def check_projection(self) -> None:
        """Refuse LoGra with a projection of whole gradients, which are never formed.

        Raises:
            InvalidInputError: naming the type.
        """
        if isinstance(self.method, LograMethod) and self.method.projection.type != "factored":
            raise InvalidInputError("logra needs a projection of type factored", "/method/projection/type")

    def check_head(self) -> None:
        """Refuse representer points of what does not end in one linear layer, and of other layers.

        Raises:
            InvalidInputError: naming the method or the layers.
        """
        if not isinstance(self.method, RepresenterMethod):
            return
        if isinstance(self.task, CausalLanguageModelingTask):
            raise InvalidInputError("representer is for classification and regression", "/method/type")
        if self.layers is not None:
            raise InvalidInputError("representer is of the last linear layer", "/layers")

    def segments(self, method: SourceMethod) -> list[list[Segment]]:
        """Return the segments of every run.

        Raises:
            InvalidInputError: if a run has fewer checkpoints than segments are asked for.
        """
        points = [
            Point(number, checkpoint.step or 0, (checkpoint.learning_rate or 0.0) / (1 - method.momentum))
            for number, checkpoint in enumerate(self.checkpoints)
        ]
        return [segments([points[number] for number in run], method.segments) for run in self.runs()]

    def curvature_groups(self) -> list[tuple[int, ...]]:
        """Return which members share a curvature: those of a segment, else each has its own."""
        if isinstance(self.method, SourceMethod):
            return [segment.checkpoints for run in self.segments(self.method) for segment in run]
        return [(number,) for number in range(len(self.members))]

    def _training(self) -> object:
        """Return what decides weights that the method trains."""
        if self.recipe is None:
            return None
        recipe = self.recipe.model_dump(mode="json", exclude={"initialisation"})
        return [recipe, self.initial.sha256 if self.initial else None]

    def _identity(self, checkpoint: CheckpointRef) -> object:
        """Return what of a checkpoint decides scores."""
        if not self.method.follows_training:
            return checkpoint.sha256
        return [checkpoint.sha256, checkpoint.run, checkpoint.step, checkpoint.learning_rate]


@dataclass(frozen=True)
class FitSummary:
    """What a finished fit is.

    Attributes:
        dim: numbers per stored row, all checkpoints together.
        bytes: of the artifact.
        recall: of the first search stage against an exact scan, measured on training rows as queries; None where nothing is searched for.
        coverage: percentage of parameters attributed, layers covered and skipped.
        num_training: n, of which each example has its share.
        drift: per layer and in all, how far kept factors are from what new rows say; None where every factor is new.
    """

    fingerprint: str
    num_examples: int
    dim: int
    bytes: int
    recall: float | None
    coverage: dict[str, Any]
    num_training: int
    drift: dict[str, Any] | None = None
