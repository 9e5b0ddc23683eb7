"""What a training depends on, and the protocol of a bank of retrainings; free of torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from attribution_core.errors import InvalidInputError
from attribution_core.fingerprint import sha256_file, sha256_of
from attribution_core.references import CheckpointRef, DatasetRef
from attribution_core.spec import ArchitectureSpec, Seed, Spec, TaskSpec, TokenizerSpec
from attribution_core.training.recipe import CheckpointInitialisation, Recipe
from attribution_core.training.sizes import drawn_size

Semantics = Literal["resample", "mask"]
Sizes = Literal["fixed", "varied"]
MODELS_PER_GROUP = 32
_GROUP_PARAMETERS = 64 << 20


class TrainSpec(Spec):
    """Everything a training depends on but its seed; JSON in, JSON out.

    Attributes:
        initial: the checkpoint that the recipe starts from, None where the seed decides.
        left_out: rows of the data set that no training sees, ascending: deleted examples. Rows keep their numbers.
    """

    architecture: ArchitectureSpec
    task: TaskSpec
    tokenizer: TokenizerSpec | None = None
    tokenizer_path: Path | None = None
    dataset: DatasetRef
    recipe: Recipe
    initial: CheckpointRef | None = None
    left_out: list[int] = Field(default_factory=list)
    format: Literal[1] = 1

    @model_validator(mode="after")
    def _initial_as_asked(self) -> Self:
        asked = self.recipe.initialisation
        wanted = asked.checkpoint if isinstance(asked, CheckpointInitialisation) else None
        if wanted != (self.initial.id if self.initial else None):
            raise ValueError("initial must be the checkpoint that the recipe's initialisation names")
        return self

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        self.dataset.check_left_out(self.left_out)
        return self

    @property
    def training_rows(self) -> np.ndarray:
        """The rows that are trained on, in order, (num_training,) int64."""
        return np.setdiff1d(np.arange(self.dataset.num_examples), np.asarray(self.left_out, np.int64))

    @property
    def num_training(self) -> int:
        """How many examples are trained on."""
        return self.dataset.num_examples - len(self.left_out)

    def everything(self) -> np.ndarray:
        """Return which rows of the data set are trained on, (n,) bool."""
        kept = np.ones(self.dataset.num_examples, bool)
        kept[self.left_out] = False
        return kept

    def fingerprint(self) -> str:
        """Return the hash of all that decides the trained weights, given a seed: recipe, architecture, task, data, initial weights."""
        decides = self.model_dump(mode="json", include={"architecture", "task", "tokenizer", "left_out", "format"})
        recipe = self.recipe.model_dump(mode="json", exclude={"initialisation"})
        initial = self.initial.sha256 if self.initial else None
        tokenizer = sha256_file(self.tokenizer_path) if self.tokenizer_path else None
        return sha256_of([decides, recipe, self.dataset.reading(), self.dataset.sha256, initial, tokenizer])


class Protocol(Spec):
    """Which retrainings make up a bank: random subsets that keep a share of the examples, each trained with several seeds.

    Subset j is a function of (seed, alpha, sizes, n, left_out, j) alone, so a larger bank begins with the smaller one.
    """

    alpha: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of the examples that each subset keeps; the mean share if sizes vary.",
    )
    # Absent from hashes and stored protocols while it says nothing, so that older banks keep their keys.
    sizes: Sizes = Field(
        default="fixed",
        exclude_if=lambda sizes: sizes == "fixed",
        description="`varied` is for Shapley and Beta Shapley values: the first subset keeps nothing (the untrained model), the second "
        "everything, and the others' sizes are spread over all between, the small and the large ones closer together.",
    )
    subsets: int = Field(ge=1, le=100_000, description="How many subsets.")
    seeds: int = Field(default=1, ge=1, le=1024, description="Trainings per subset; their mean is the expected output.")
    first_seed: Seed = Field(default=1000, description="The trainings' seeds are this and those that follow it.")
    semantics: Semantics = Field(
        default="resample",
        description="`resample` trains on the subset alone: its own batches, fewer steps. `mask` takes the seed's and the batches of "
        "training on everything, and left-out examples weigh zero in their batch's mean, which is still over the whole batch.",
    )
    seed: Seed = Field(default=0, description="Of the subsets.")

    @model_validator(mode="after")
    def _half_on_average(self) -> Self:
        if self.sizes == "varied" and self.alpha != 0.5:
            raise ValueError("subsets of varied sizes keep half of the examples on average: leave alpha at 0.5")
        return self

    def bank_key(self, spec: TrainSpec) -> str:
        """Return the hash of what decides each retraining; banks of more or fewer subsets share it."""
        return sha256_of([spec.fingerprint(), self.model_dump(mode="json", exclude={"subsets"})])

    def training_seeds(self) -> list[int]:
        """Return the seeds that every subset is trained with."""
        return [self.first_seed + number for number in range(self.seeds)]

    def subsets_per_group(self, num_parameters: int) -> int:
        """Return how many subsets are trained and stored together: 32 models, fewer of large ones, and at least one subset."""
        models = min(MODELS_PER_GROUP, _GROUP_PARAMETERS // max(1, num_parameters))
        return max(1, models // self.seeds)

    def num_groups(self, num_parameters: int) -> int:
        """Return how many groups hold the subsets; the last may hold more than are asked for."""
        return -(-self.subsets // self.subsets_per_group(num_parameters))


def check_subsets(protocol: Protocol, recipe: Recipe, n: int, left_out: Sequence[int] = ()) -> None:
    """Refuse subsets of n rows that keep none or all of them where they should not, or too few to train on.

    Raises:
        InvalidInputError: naming the share that is kept, or the recipe's batch size.
    """
    trained = n - len(left_out)
    varied = protocol.sizes == "varied"
    sizes = {subset_size(protocol, trained, number) for number in range(protocol.subsets if varied else 1)}
    if protocol.semantics == "resample":
        recipe.check_steps(min(sizes - {0}, default=trained))


def subset_size(protocol: Protocol, n: int, j: int) -> int:
    """Return how many of n examples subset j keeps.

    Raises:
        InvalidInputError: if subsets of one size would keep none or all of them, or there are none between.
    """
    if protocol.sizes == "varied":
        if n < 2:
            raise InvalidInputError(f"of {n} examples no subset keeps some and leaves out others", "/sizes")
        return (0, n)[j] if j < 2 else drawn_size(n, protocol.seed, j)
    kept = round(protocol.alpha * n)
    if not 0 < kept < n:
        raise InvalidInputError(f"alpha {protocol.alpha} keeps {kept} of {n} examples", "/alpha")
    return kept


def subset_mask(protocol: Protocol, n: int, j: int, left_out: Sequence[int] = ()) -> np.ndarray:
    """Return which of n rows subset j keeps, (n,) bool: of the m rows that are not left out exactly `subset_size(protocol, m, j)`.

    The bits of a Philox counter are sorted, as numpy promises those, and not its permutations, for all time.

    Raises:
        InvalidInputError: if that many are none or all of them, and should not be.
    """
    rows = np.setdiff1d(np.arange(n), np.asarray(left_out, np.int64))
    kept = subset_size(protocol, len(rows), j)
    entropy: list[Any] = [protocol.seed, len(rows), j, *np.array([protocol.alpha]).view(np.uint32).tolist()]
    if protocol.sizes == "varied":  # not the larger and smaller brothers of another bank's subsets
        entropy.append(1)
    bits = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(len(rows))
    mask = np.zeros(n, bool)
    mask[rows[np.argsort(bits, kind="stable")[:kept]]] = True
    return mask
