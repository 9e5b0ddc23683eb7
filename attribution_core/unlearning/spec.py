"""How a forget set is unlearned and what the result is compared with; free of torch."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from attribution_core.errors import InvalidInputError, located
from attribution_core.fingerprint import sha256_of
from attribution_core.fit_spec import DatasetRef, FitSpec
from attribution_core.method_spec import (
    Damping,
    ExactMethod,
    ExplicitMethod,
    FisherMethod,
    GasMethod,
    GradCosMethod,
    RepresentationMethod,
)
from attribution_core.spec import Row, Seed, Spec
from attribution_core.training.recipe import Adam, AdamW, OptimizerSpec, Recipe, Sgd
from attribution_core.training.spec import Semantics, TrainSpec

Estimator = Literal["additive", "newton"]
RETAINED_PER_FORGOTTEN = 4
_L2 = "Strength of the penalty `l2/2 ‖θ‖²` that was added to the mean loss in training; by default the recipe's coupled weight decay, or 0."


class Newton(Spec):
    """One Newton step on the examples that stay, under the index's curvature; takes an index of ekfac, kfac, diagonal, gauss_newton or explicit.

    `θ' = θ + t (n(H̄ + λ) - H_F + (n - |F|) l2)⁻¹ (Σ_F ∇ℓ_i + |F| l2 θ)`, with H_F the forget set's share of the curvature.
    """

    reference: ClassVar[str] = "Guo et al. 2020; Warnecke et al. 2021; Grosse et al. 2023"
    type: Literal["newton"]
    damping: Damping | None = Field(
        default=None,
        description="λ as a multiple of each layer's mean eigenvalue; by default what the index names, else 0.1.",
    )
    l2: float | None = Field(default=None, ge=0, le=1e12, description=_L2)
    curvature: Literal["rest", "all"] = Field(
        default="rest",
        description="`rest` takes the forget set out of the curvature; `all` leaves it in, which is the influence function.",
    )
    scale: float = Field(default=1.0, gt=0, le=1e6, description="t, what the step is multiplied with.")
    line_search: bool = Field(
        default=False,
        description="Halve the step until it lowers the objective of what stays, of up to 4,096 examples, as far as its slope "
        "promises (Armijo's rule).",
    )


class ExactNewton(Spec):
    """The optimum without the forget set, for linear and logistic regression."""

    reference: ClassVar[str] = "Pregibon 1981; Guo et al. 2020"
    type: Literal["exact_newton"]
    estimator: Literal["newton", "alo"] = Field(
        default="newton",
        description="`newton`: steps until the optimum, the refit itself. `alo`: a single step, the refit for squared errors.",
    )
    l2: float | None = Field(default=None, ge=0, le=1e12, description=_L2)
    regulariser: Literal["per_example", "fixed"] = Field(
        default="per_example",
        description="Of what stays, `per_example`: the mean loss with the same l2. `fixed`: the sum of losses with the same total penalty.",
    )
    optimum: Literal["require", "polish", "assume"] = Field(
        default="polish",
        description="What to do with weights that are not at the optimum: refuse them, unlearn from the optimum nearby, or take them for one.",
    )


class FineTuning(Spec):
    """Steps from the checkpoint's weights on."""

    optimizer: OptimizerSpec = Field(description="What turns gradients into steps.")
    learning_rate: float = Field(gt=0, le=1e6, description="η of every step.")
    epochs: int = Field(ge=1, le=10_000, description="Passes over the examples it trains on.")
    batch_size: int = Field(default=50, ge=1, le=1_000_000, description="Examples per step.")
    seed: Seed = Field(default=0, description="Of the order of examples.")

    def trained_on(self, forgotten: int, retained: int) -> int:
        """Return how many examples an epoch goes through, of so many that are forgotten and that stay."""
        return forgotten

    def recipe(self) -> Recipe:
        """Return the steps as a recipe, wherever they start."""
        return Recipe(
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_size=self.batch_size,
        )


class DatamodelMatching(FineTuning):
    """Fine-tune until the model outputs what the index predicts of a model trained without the forget set.

    Matched is the index's measurement (its margin, by default) on the forget set and on some examples that stay, by squared error; with
    an index that measures `logit`, the logits of all classes.
    """

    reference: ClassVar[str] = "Georgiev et al. 2024, Attribute-to-Delete: Machine Unlearning via Datamodel Matching"
    type: Literal["datamodel_matching"]
    optimizer: OptimizerSpec = Field(default=Adam(), description="What turns gradients into steps.")
    learning_rate: float = Field(default=1e-3, gt=0, le=1e6, description="η of every step.")
    epochs: int = Field(default=10, ge=1, le=10_000, description="Passes over the matched examples.")
    retained: int | None = Field(
        default=None,
        ge=0,
        le=10_000_000,
        description="How many examples that stay are matched too, evenly spread; four for each forgotten one by default.",
    )
    damping: Damping | None = Field(default=None, description="Of the predictions; the index's own by default.")
    estimator: Estimator = Field(
        default="additive",
        description="Of the predictions: sums of scores, or the index's Newton step on what the group leaves behind.",
    )
    scale: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="What predicted changes are multiplied with, where they are known to be off.",
    )

    def trained_on(self, forgotten: int, retained: int) -> int:
        """Return how many examples are matched."""
        wanted = RETAINED_PER_FORGOTTEN * forgotten if self.retained is None else self.retained
        return forgotten + min(wanted, retained)


class GradientAscent(FineTuning):
    """Raise the loss of the forget set: a baseline."""

    reference: ClassVar[str] = "Graves et al. 2021; Golatkar et al. 2020"
    type: Literal["gradient_ascent"]
    optimizer: OptimizerSpec = Field(default=Sgd(), description="What turns gradients into steps.")
    learning_rate: float = Field(default=1e-2, gt=0, le=1e6, description="η of every step.")
    epochs: int = Field(default=3, ge=1, le=10_000, description="Passes over the forget set.")


class FineTune(FineTuning):
    """Train on with the examples that stay, and hope that the others are forgotten: a baseline."""

    reference: ClassVar[str] = "Golatkar et al. 2020"
    type: Literal["fine_tune"]
    optimizer: OptimizerSpec = Field(default=Sgd(momentum=0.9), description="What turns gradients into steps.")
    learning_rate: float = Field(default=1e-2, gt=0, le=1e6, description="η of every step.")
    epochs: int = Field(default=5, ge=1, le=10_000, description="Passes over the examples that stay.")

    def trained_on(self, forgotten: int, retained: int) -> int:
        """Return how many examples stay."""
        return retained


UnlearningMethod = Annotated[
    Newton | ExactNewton | DatamodelMatching | GradientAscent | FineTune, Field(discriminator="type")
]


class EvaluationSet(Spec):
    """Examples of another data set that the comparison looks at too.

    Attributes:
        rows: all by default.
    """

    dataset: DatasetRef
    rows: list[Row] | None = None


class UnlearnSpec(Spec):
    """Everything unlearning depends on; JSON in, JSON out. `check` says whether it can be done.

    Attributes:
        index: the fitted artifact's folder.
        fit: what it was fitted from; its answering checkpoints are unlearned, each for itself.
        forget: rows of the training set.
        baselines: other methods that the comparison judges beside the one that is asked for.
        train: how the model was trained.
        oracles: trainings without the forget set to compare with; 0 for no comparison.
        first_seed: the oracles' seeds are this and those that follow it.
        semantics: what leaving out means for the oracles.
    """

    index: Path
    fit: FitSpec
    forget: list[Row]
    method: UnlearningMethod
    baselines: list[UnlearningMethod] = Field(default=[], max_length=16)
    train: TrainSpec | None = None
    oracles: int = Field(default=0, ge=0, le=1024)
    first_seed: Seed = 1000
    semantics: Semantics = "resample"
    test: EvaluationSet | None = None
    format: Literal[1] = 1

    def methods(self) -> list[UnlearningMethod]:
        """Return the method that is asked for, and the baselines."""
        return [self.method, *self.baselines]

    def forgotten(self) -> np.ndarray:
        """Return the forget set's rows in order, each once, int64."""
        return np.unique(np.array(self.forget, np.int64))

    def retained(self) -> np.ndarray:
        """Return all other rows that are trained on, in order, int64; deleted examples are in neither set."""
        absent = [self.fit.left_out, self.train.left_out if self.train else []]
        gone = np.concatenate([self.forgotten(), *(np.asarray(rows, np.int64) for rows in absent)])
        return np.setdiff1d(np.arange(self.fit.dataset.num_examples), gone)

    def kept(self) -> np.ndarray:
        """Return which examples stay, (n,) bool."""
        kept = np.zeros(self.fit.dataset.num_examples, bool)
        kept[self.retained()] = True
        return kept

    def l2(self, method: Newton | ExactNewton) -> float:
        """Return the strength of the penalty in training: as given, or the recipe's coupled weight decay."""
        if method.l2 is not None:
            return method.l2
        if self.train is None or isinstance(self.train.recipe.optimizer, AdamW):
            return 0.0
        return self.train.recipe.weight_decay

    def fine_tunings(self) -> list[tuple[TrainSpec, int]]:
        """Return how every method that fine-tunes trains, and how many examples an epoch of all checkpoints together goes through."""
        shared = {
            name: getattr(self.fit, name) for name in ("architecture", "task", "tokenizer", "tokenizer_path", "dataset")
        }
        sizes, checkpoints = (len(self.forgotten()), len(self.retained())), len(self.fit.answering())
        return [
            (TrainSpec(recipe=method.recipe(), **shared), checkpoints * method.trained_on(*sizes))
            for method in self.methods()
            if isinstance(method, FineTuning)
        ]

    def fingerprint(self) -> str:
        """Return the hash of all that decides the new weights and the comparison."""
        decides = self.model_dump(
            mode="json", include={"method", "baselines", "oracles", "first_seed", "semantics", "format"}
        )
        train = self.train.fingerprint() if self.train else None
        test = [self.test.dataset.reading(), self.test.dataset.sha256, self.test.rows] if self.test else None
        return sha256_of([decides, self.forgotten().tolist(), self.fit.fingerprint(), train, test])

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            InvalidInputError: naming the field.
        """
        self._check_rows()
        self._check_comparison()
        self._check_method(self.method, "/method")
        for number, method in enumerate(self.baselines):
            self._check_method(method, f"/baselines/{number}")

    def _check_rows(self) -> None:
        n, forgotten = self.fit.dataset.num_examples, self.forgotten()
        if not len(forgotten):
            raise InvalidInputError("the forget set is empty: name at least one training example", "/forget")
        if forgotten[-1] >= n:
            raise InvalidInputError(f"row {forgotten[-1]} is not one of the {n} training examples", "/forget")
        if not len(self.retained()):
            raise InvalidInputError(
                "the forget set is the whole training set: nothing would be left to train on", "/forget"
            )
        if self.test is not None and self.test.rows is not None:
            count = self.test.dataset.num_examples
            if not self.test.rows or max(self.test.rows) >= count:
                raise InvalidInputError(f"name rows among the test set's {count} examples", "/test/rows")

    def _check_comparison(self) -> None:
        if not self.oracles:
            if self.baselines:
                raise InvalidInputError("baselines are for a comparison with oracles", "/baselines")
            return
        if self.oracles == 1:
            raise InvalidInputError("one retraining has no distribution: ask for two oracles or more", "/oracles")
        if self.train is None:
            raise InvalidInputError("oracles are retrained, and this model has no recipe to train it from", "/oracles")
        if self.semantics == "resample":
            with located("/oracles"):
                self.train.recipe.check_steps(len(self.retained()))
        same = (self.fit.architecture, self.fit.task, self.fit.dataset.sha256)
        if (self.train.architecture, self.train.task, self.train.dataset.sha256) != same:
            raise InvalidInputError("the recipe is of another model or training set than the index", "/train")

    def _check_method(self, method: UnlearningMethod, pointer: str) -> None:
        fitted = self.fit.method
        if not self.fit.checkpoints:
            raise InvalidInputError(
                f"an index of {fitted.type} has no checkpoints: name one that was fitted to the checkpoints to unlearn",
                f"{pointer}/type",
            )
        match method:
            case Newton() if not isinstance(fitted, FisherMethod | ExplicitMethod):
                raise InvalidInputError(
                    f"newton takes the curvature of an index of ekfac, kfac, diagonal, gauss_newton or explicit, not {fitted.type}",
                    f"{pointer}/type",
                )
            case ExactNewton() if self.fit.architecture.name not in ExactMethod.architectures:
                raise InvalidInputError(
                    f"exact_newton is for linear and logistic regression, not {self.fit.architecture.name}",
                    f"{pointer}/type",
                )
            case DatamodelMatching() if isinstance(fitted, RepresentationMethod | GradCosMethod | GasMethod):
                raise InvalidInputError(
                    f"datamodel_matching needs predictions of any example's outputs, and {fitted.type} makes none",
                    f"{pointer}/type",
                )
            case DatamodelMatching(estimator=estimator) if estimator not in fitted.estimators:
                raise InvalidInputError(
                    f"{fitted.type} has no {estimator} estimator; it has {', '.join(fitted.estimators)}",
                    f"{pointer}/estimator",
                )
