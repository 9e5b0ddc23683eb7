"""What an evaluation measures, as one value: made by whoever submits it, read by whoever runs it; free of torch."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from attribution_core.fit_spec import DatasetRef, FitSpec, PriorRef
from attribution_core.method_spec import Damping
from attribution_core.spec import ColumnName, Filter, Spec, all_different
from attribution_core.training.spec import Protocol, TrainSpec

DAMPINGS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


class LooSpec(Spec):
    """Retrain without single examples."""

    examples: int = Field(default=20, ge=3, le=10_000, description="Evenly spread over all influences' sizes.")
    seeds: int = Field(default=3, ge=1, le=1024)


class RemovalSpec(Spec):
    """Retrain without the examples ranked highest for a query: by the method, at random, and by similarity."""

    top: Annotated[
        list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=16), AfterValidator(all_different)
    ] = Field(default=[10, 50], description="How many of the most positive examples are left out.")
    queries: int = Field(default=5, ge=1, le=1000, description="The first of the evaluation's queries.")
    seeds: int = Field(default=2, ge=1, le=1024)

    def retrainings(self) -> int:
        """Return how many models are trained, those on everything included."""
        return (3 * len(self.top) * self.queries + 1) * self.seeds


class TuneSpec(Spec):
    """Choose the damping, and among other indexes the best, by LDS on half of the bank's subsets."""

    dampings: Annotated[list[Damping], Field(min_length=2, max_length=32), AfterValidator(all_different)] = Field(
        default=list(DAMPINGS), description="Candidates, as multiples of the mean eigenvalue."
    )
    candidates: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=16)] = Field(
        default_factory=list, description="Other indexes of the same model and data set to compare with; ids or names."
    )


class BankRef(Spec):
    """A bank and the files of those of its groups that are retrained already."""

    protocol: Protocol
    groups: dict[int, Path] = Field(default_factory=dict)


class EvaluationSpec(Spec):
    """Everything an evaluation depends on; JSON in, JSON out.

    Attributes:
        folder: of the index's artifact.
        rows: of `queries` that are asked about.
        banks: the main one first, then those of the deterministic protocols.
        tune: the candidates; True for the default ones.
        rivals: the indexes that `tune` names.
    """

    folder: Path
    fit: FitSpec
    train: TrainSpec
    queries: DatasetRef
    rows: list[int] = Field(min_length=1)
    banks: list[BankRef] = Field(min_length=1)
    loo: LooSpec | None = None
    removal: RemovalSpec | None = None
    mislabelled: Filter | None = None
    source: ColumnName | None = None
    tune: TuneSpec | bool = False
    rivals: list[PriorRef] = Field(default_factory=list)
