"""Indexes that learn from a bank of retrainings: what each query measures under every retrained model, regressed on what was left out.

A fit retrains what is missing of the bank. For a posterior it also keeps what the named queries say: their prior scores and their measurements.
A query is answered by running it through the bank's models; a posterior conditions it with what the named queries taught, so that what queries
have in common is learnt once, and the answer does not depend on what else is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribution_core.arrays import mapped_arrays, read_arrays, write_arrays
from attribution_core.bank_methods.ame import average_marginal_effects
from attribution_core.bank_methods.banzhaf import data_banzhaf
from attribution_core.bank_methods.checks import check_retrainings
from attribution_core.bank_methods.datamodels import lasso_datamodel, ridge_datamodel
from attribution_core.bank_methods.empirical_influence import empirical_influence
from attribution_core.bank_methods.posterior import Learned, PosteriorDatamodel, condition, learn
from attribution_core.bank_methods.semivalues import beta_shapley
from attribution_core.data.batch import Batch
from attribution_core.errors import FingerprintMismatchError
from attribution_core.evaluate.retrainings import Retrainings
from attribution_core.fit_spec import FitSpec, FitSummary
from attribution_core.method_spec import (
    AmeMethod,
    BankMethodBase,
    BanzhafMethod,
    DatamodelsMethod,
    EmpiricalInfluenceMethod,
    PosteriorMethod,
    SemivalueMethodBase,
)
from attribution_core.methods.answers import Query
from attribution_core.methods.artifact import bytes_of, read_description, write_description
from attribution_core.methods.context import FitContext
from attribution_core.methods.dense import ScoredIndex
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.magic import train_spec
from attribution_core.methods.pairs import all_scores
from attribution_core.progress import Progress
from attribution_core.sharding import Stage
from attribution_core.training.bank import DIVERGED, Bank, train_group
from attribution_core.training.spec import Protocol, subset_size
from attribution_core.training.trainer import Trainer

Arrays = dict[str, np.ndarray]
EVIDENCE_FILE = "evidence.safetensors"
Prior = LoadedIndex | ScoredIndex


@dataclass(frozen=True)
class GroupPiece:
    """A group of a bank. One that was retrained before is a shard of a copy: attempts of a job agree on the shards' numbers."""

    ordinal: int
    units: int


@dataclass(frozen=True)
class NewGroup:
    """A group of a bank that a job retrained.

    Attributes:
        bank: the job's number of it.
        diverged: how many of its retrainings are not finite.
    """

    bank: int
    group: int
    path: Path
    retrainings: int
    diverged: int

    @classmethod
    def of(cls, bank: int, group: int, path: Path) -> "NewGroup":
        """Describe a shard's file."""
        diverged = read_arrays(path)[DIVERGED]
        return cls(bank, group, path, diverged.size, int(diverged.sum()))


def group_pieces(trainer: Trainer, protocol: Protocol, known: Sequence[int], first: int = 0) -> list[GroupPiece]:
    """Return a piece for every group of a bank, numbered from `first`; progress counts steps."""
    groups = range(protocol.num_groups(trainer.network.num_parameters))
    return [
        GroupPiece(first + group, 0 if group in known else _group_steps(trainer, protocol, group)) for group in groups
    ]


def _group_steps(trainer: Trainer, protocol: Protocol, group: int) -> int:
    n, size = trainer.spec.num_training, protocol.subsets_per_group(trainer.network.num_parameters)
    numbers = range(group * size, (group + 1) * size)
    examples = [subset_size(protocol, n, number) if protocol.semantics == "resample" else n for number in numbers]
    return protocol.seeds * sum(trainer.recipe.num_steps(count) for count in examples)


class BankPipeline:
    """Runs the parts of one fit; see `FitPipeline`.

    Args:
        spec: what is fitted.
        work: folder of the job's files.
        device: where torch computes.
        priors: the indexes that a posterior begins with.

    Raises:
        InvalidInputError: if the method could not learn from its bank.
    """

    def __init__(self, spec: FitSpec, work: Path, device: str, priors: Sequence[Prior]) -> None:
        assert isinstance(spec.method, BankMethodBase)
        check_retrainings(spec)
        self.spec, self.method, self.work, self.device = spec, spec.method, work, device
        self.trainer = Trainer(train_spec(spec), device)
        self._priors = list(priors)
        self._pieces = group_pieces(self.trainer, self.method.bank, list(spec.bank))

    def stages(self) -> list[Stage]:
        """Return the one stage."""
        return [Stage("retraining", tuple(self._pieces))]

    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> Arrays:
        """Retrain one group, or take it as the bank has it: another worker may have found it there, or not."""
        if ordinal in self.spec.bank:
            return read_arrays(self.spec.bank[ordinal])
        return train_group(self.trainer, self.method.bank, ordinal, progress)

    def reduce(self, stage: str, shard_files: Sequence[Path], progress: Progress) -> Arrays:
        """Return nothing: every group stands for itself."""
        return {}

    def new_groups(self, files: Sequence[Path]) -> list[NewGroup]:
        """Return what this fit retrained."""
        return [NewGroup.of(0, group, path) for group, path in enumerate(files) if group not in self.spec.bank]

    def assemble(self, into: Path, files: Sequence[Path], progress: Progress) -> FitSummary:
        """Lay out the artifact in an empty folder.

        Raises:
            InvalidInputError: if the retrainings that did not diverge are too few for the method.
        """
        bank = Bank(train_spec(self.spec), self.method.bank, files, self.device)
        context = FitContext(self.spec, self.device)
        coverage = {"percent": 100.0, "covered": [], "skipped": [], "diverged": int(bank.diverged.sum())}
        if isinstance(self.method, PosteriorMethod):
            queries = _named_queries(context, self.method)
            scores = np.stack([all_scores(prior, queries) for prior in self._priors])
            values = bank.values(queries, self.spec.measurement)
            learned = learn(list(scores), Retrainings(bank.masks, values))
            coverage["posterior"] = learned.hyperparameters.as_json()
            write_arrays(into / EVIDENCE_FILE, {"scores": scores.astype(np.float32), "values": values})
        else:  # what a query would be refused for
            _scores(self.method, Retrainings(bank.masks, np.where(bank.diverged, np.nan, 0.0)[:, :, None]))
        described = {"fingerprint": self.spec.fingerprint(), "coverage": coverage, "recall": None}
        write_description(into, described)
        size = bytes_of(into)
        n = self.spec.dataset.num_examples
        return FitSummary(
            self.spec.fingerprint(), n, self.method.bank.subsets, size, None, coverage, self.spec.num_training
        )


@dataclass(frozen=True)
class PosteriorQuery(Query):
    """Encoded queries with their posterior."""

    posterior: PosteriorDatamodel

    def __getitem__(self, part: slice) -> "PosteriorQuery":
        return PosteriorQuery(
            self.outputs[part], [], self.rows[part], self.batch[part], self.damping, self.posterior.of(part)
        )


class BankIndex(ScoredIndex):
    """A method over a bank, ready to answer.

    Args:
        folder: the artifact; its files are checked against the checksums it was written with.
        spec: what the artifact must have been fitted from; its `bank` names every group's file.
        context: reused if the fit has one.
        device: where torch computes.
        priors: the indexes that a posterior begins with.

    Raises:
        FingerprintMismatchError: if the artifact was fitted from something else.
        CorruptArtifactError: if a file is missing, damaged or inconsistent.
    """

    def __init__(
        self, folder: Path, spec: FitSpec, context: FitContext | None, device: str, priors: Sequence[Prior]
    ) -> None:
        described = read_description(folder)
        if described["fingerprint"] != spec.fingerprint():
            raise FingerprintMismatchError("the index was fitted to other weights, data or parameters; fit it again")
        assert isinstance(spec.method, BankMethodBase)
        self.folder, self.spec, self.method = folder, spec, spec.method
        self.context = context or FitContext(spec, device)
        self.coverage: dict[str, Any] = described["coverage"]
        self._priors = list(priors)
        files = [spec.bank[group] for group in sorted(spec.bank)]
        self._bank = Bank(train_spec(spec), self.method.bank, files, device)
        self._evidence = mapped_arrays(folder / EVIDENCE_FILE) if isinstance(self.method, PosteriorMethod) else {}

    @property
    def num_examples(self) -> int:
        """n, the size of the training set."""
        return self.spec.dataset.num_examples

    @property
    def bytes(self) -> int:
        """An estimate of what this index keeps in memory."""
        kept = self._bank.masks.nbytes + sum(array.nbytes for array in self._evidence.values())
        return kept + sum(prior.bytes for prior in self._priors)

    def query(self, batch: Batch, damping: float | None) -> Query:
        """Score all training examples for queries, each for itself; `damping` is the priors'.

        Raises:
            InvalidInputError: if the queries do not fit the model, or a prior cannot score them.
        """
        outputs, values = self.outputs(batch), self._bank.values(batch, self.spec.measurement)
        if not isinstance(self.method, PosteriorMethod):
            rows = _scores(self.method, Retrainings(self._masks, values)).astype(np.float32)
            return Query(outputs, [], rows, batch, damping)
        methods = [all_scores(prior, batch, damping) for prior in self._priors]
        posterior = condition(self._learned, methods, Retrainings(self._masks, values))
        return PosteriorQuery(outputs, [], posterior.scores.astype(np.float32), batch, damping, posterior)

    def outputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return what the model outputs for queries, mean over the index's checkpoints.

        Raises:
            InvalidInputError: if the queries do not fit the model.
        """
        checkpoints = [self.context.checkpoint(number) for number in self.spec.answering()]
        found = [checkpoint.output(batch) for checkpoint in checkpoints]
        task, measurement = self.context.task, self.spec.measurement
        described = task.describe(torch.stack(found).mean(0), batch, measurement)
        values = torch.stack([task.measure(output, batch, measurement) for output in found]).mean(0).tolist()
        return [{**entry, "value": value} for entry, value in zip(described, values, strict=True)]

    def spreads(self, query: Query, groups: Sequence[np.ndarray]) -> np.ndarray:
        """Return the posterior variance of leaving out each group, (queries, groups); `Σ τ²` for methods without a posterior."""
        if not isinstance(query, PosteriorQuery):
            return super().spreads(query, groups)
        removed = np.zeros((len(groups), self.num_examples))
        for number, rows in enumerate(groups):
            removed[number, rows] = 1
        return query.posterior.variances(removed)

    def deviations(self, query: Query, groups: Sequence[np.ndarray]) -> np.ndarray | None:
        """Return the standard deviation of one retraining's change without each group, (queries, groups); None without a posterior."""
        if not isinstance(query, PosteriorQuery):
            return None
        return np.asarray(np.sqrt(self.spreads(query, groups) + query.posterior.noise[:, None]))

    @cached_property
    def _learned(self) -> Learned:
        """What the named queries taught."""
        known = Retrainings(self._masks, self._evidence["values"])
        return learn(list(self._evidence["scores"]), known)

    @cached_property
    def _masks(self) -> np.ndarray:
        return self._bank.masks


def _scores(method: BankMethodBase, retrainings: Retrainings) -> np.ndarray:
    """Return a method's scores, (queries, n)."""
    match method:
        case DatamodelsMethod(penalty="ridge"):
            return ridge_datamodel(retrainings).scores
        case DatamodelsMethod():
            return lasso_datamodel(retrainings).scores
        case EmpiricalInfluenceMethod():
            return empirical_influence(retrainings)
        case AmeMethod():
            return average_marginal_effects(retrainings)
        case BanzhafMethod():
            return data_banzhaf(retrainings)
    assert isinstance(method, SemivalueMethodBase)
    return beta_shapley(retrainings, *method.parameters)


def _named_queries(context: FitContext, method: PosteriorMethod) -> Batch:
    queries = context.spec.queries
    assert queries is not None
    return context.source_of(queries.folder, queries.spec).batch(method.queries.rows)
