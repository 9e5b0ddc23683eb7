"""An evaluation as shards: what is missing of the banks and the explicit retrainings first, then everything is measured.

Retrainings without chosen examples (leave-one-out, removal curves) are sets of rows to leave out, each trained with the same seeds as training
on everything, which is the first set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from attribution_core.arrays import read_arrays
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.checks import check_evaluation
from attribution_core.evaluate.lds import linear_datamodeling_score
from attribution_core.evaluate.loo import leave_one_out
from attribution_core.evaluate.mislabel import mislabel_auc
from attribution_core.evaluate.mixture import mixture_check
from attribution_core.evaluate.removal import random_ranking, ranking_of, removal_masks, removal_result
from attribution_core.evaluate.retrainings import Retrainings
from attribution_core.evaluate.served import ServedCalibration, fit_served
from attribution_core.evaluate.spec import BankRef, EvaluationSpec, TuneSpec
from attribution_core.methods.bank import GroupPiece, NewGroup, group_pieces
from attribution_core.methods.opening import AnyIndex, open_index
from attribution_core.methods.pairs import all_scores
from attribution_core.methods.representation import Representation
from attribution_core.progress import NoProgress, Progress
from attribution_core.sampling import evenly_spread
from attribution_core.sharding import Stage
from attribution_core.training.bank import Bank, Retrained, train_group, train_runs
from attribution_core.training.pipeline import RunGroup, run_groups
from attribution_core.training.spec import TrainSpec
from attribution_core.training.trainer import Run, Trainer

Json = dict[str, Any]
_TOP_OF_MIXTURE = 10
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class BankPiece(GroupPiece):
    """A group of one of the banks."""

    bank: int
    group: int


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        quality: every measured number with its protocol.
        calibration: what corrects and bounds later answers; None where the bank is too small.
        groups: what was retrained for the banks.
    """

    quality: Json
    calibration: ServedCalibration | None
    groups: list[NewGroup] = field(default_factory=list)


class EvaluationPipeline:
    """Retrains what is missing and measures an index.

    Args:
        spec: the evaluation.
        device: where torch computes.
        progress: asked, while scores are computed, whether the work should stop; no units are counted there.

    Raises:
        InvalidInputError: if it asks for what it cannot have.
        Cancelled: if the work should stop.
    """

    def __init__(self, spec: EvaluationSpec, device: str = "cpu", progress: Progress | None = None) -> None:
        check_evaluation(spec)
        self.spec, self.device = spec, device
        self._progress = progress or NoProgress()
        self.trainer = Trainer(spec.train, device)
        self.rows = spec.train.training_rows  # all that is measured is over these; deleted examples have no part in it
        self._sets = _SetsToRetrain(self)
        self._of_banks = self._bank_pieces()
        self._pieces: list[BankPiece | RunGroup] = [*self._of_banks]
        for seeds in self._sets.by_seeds.values():
            self._pieces += run_groups(self.trainer, seeds.runs, "resample", len(self._pieces))

    def stages(self) -> list[Stage]:
        """Return the one stage."""
        return [Stage("retraining", tuple(self._pieces))]

    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> Arrays:
        """Retrain one group."""
        piece = self._pieces[ordinal]
        if isinstance(piece, BankPiece):
            groups = self.spec.banks[piece.bank].groups
            if piece.group in groups:
                return read_arrays(groups[piece.group])
            return train_group(self.trainer, self.spec.banks[piece.bank].protocol, piece.group, progress)
        return train_runs(self.trainer, piece.runs, "resample", progress)

    def reduce(self, stage: str, shard_files: Sequence[Path], progress: Progress) -> Arrays:
        """Return nothing: every group stands for itself."""
        return {}

    def conclude(self, files: Sequence[Path]) -> Evaluated:
        """Measure everything that was asked for.

        Raises:
            Cancelled: if the work should stop.
        """
        groups = self._new_groups(files)
        main, *deterministic = (self._bank(number, files) for number in range(len(self.spec.banks)))
        damping, quality = self._tuned(main) if self.spec.tune else (None, self._measured(main, self.scores(None)))
        scores = self.scores(damping)
        calibration = self._calibrated(main, scores)
        quality |= {
            "calibration": None if calibration is None else _summary(calibration),
            "deterministic": [self._measured(bank, scores) for bank in deterministic],
            "loo": None,
            "removal": None,
            "mislabel": self._mislabel(),
            "mixture": self._mixture(scores),
        }
        quality |= self._sets.measured(scores, list(files))
        return Evaluated(quality, calibration, groups)

    @cached_property
    def index(self) -> AnyIndex:
        """The index that is evaluated."""
        return open_index(self.spec.folder, self.spec.fit, device=self.device)

    @cached_property
    def batch(self) -> Batch:
        """The queries."""
        source = self.index.context.source_of(self.spec.queries.folder, self.spec.queries.spec)
        return source.batch(self.spec.rows)

    def scores(self, damping: float | None) -> np.ndarray:
        """Return the index's scores at a damping of all examples that are trained on, (queries, num_training)."""
        return self._scores_of(self.index, damping)

    def _scores_of(self, index: AnyIndex, damping: float | None) -> np.ndarray:
        return all_scores(index, self.batch, damping, self.rows, self._progress)

    @cached_property
    def full(self) -> np.ndarray:
        """The index's own outputs of the queries, (queries,)."""
        return np.array([output["value"] for output in self.index.outputs(self.batch)])

    def _bank_pieces(self) -> list[BankPiece]:
        pieces: list[BankPiece] = []
        for number, bank in enumerate(self.spec.banks):
            found = group_pieces(self.trainer, bank.protocol, list(bank.groups), len(pieces))
            pieces += [BankPiece(piece.ordinal, piece.units, number, group) for group, piece in enumerate(found)]
        return pieces

    def _new_groups(self, files: Sequence[Path]) -> list[NewGroup]:
        return [
            NewGroup.of(piece.bank, piece.group, path)
            for piece, path in zip(self._of_banks, files, strict=False)
            if piece.group not in self.spec.banks[piece.bank].groups
        ]

    def _bank(self, number: int, files: Sequence[Path]) -> tuple[BankRef, Retrainings]:
        """Return a bank, from the shards of its groups."""
        reference = self.spec.banks[number]
        paths = [path for piece, path in zip(self._of_banks, files, strict=False) if piece.bank == number]
        bank = Bank(self.spec.train, reference.protocol, paths, self.device)
        return reference, Retrainings(bank.masks[:, self.rows], bank.values(self.batch, self.spec.fit.measurement))

    def _measured(self, bank: tuple[BankRef, Retrainings], scores: np.ndarray) -> Json:
        """Return the LDS of scores against a bank."""
        reference, retrainings = bank
        found = linear_datamodeling_score(scores, retrainings).as_json()
        protocol = reference.protocol.model_dump(mode="json")
        return {
            "lds": found["lds"],
            "interval": [found["low"], found["high"]],
            "control": {"lds": found["control"], "interval": [found["control_low"], found["control_high"]]},
            "ceiling": found["ceiling"],
            "slope": found["slope"],
            "retrainings": int(retrainings.finished.size),
            "diverged": retrainings.diverged,
            "protocol": {
                **protocol,
                "subsets": found["subsets"],
                "queries": {"dataset": self.spec.queries.id, "count": found["queries"]},
                "level": found["level"],
                "resampling": found["resampling"],
                "resamples": found["resamples"],
            },
            "tuned": None,
        }

    def _tuned(self, bank: tuple[BankRef, Retrainings]) -> tuple[float, Json]:
        """Return the damping that is best on every second subset, and the quality measured on the others."""
        asked = self.spec.tune if isinstance(self.spec.tune, TuneSpec) else TuneSpec()
        reference, retrainings = bank
        halves = [retrainings.of(np.arange(start, len(retrainings.masks), 2)) for start in (0, 1)]
        on_half = {
            damping: linear_datamodeling_score(self.scores(damping), halves[0]).lds for damping in asked.dampings
        }
        best = max(on_half, key=lambda damping: on_half[damping])
        quality = self._measured((reference, halves[1]), self.scores(best))
        before = linear_datamodeling_score(self.scores(None), halves[1]).lds
        quality["tuned"] = {
            "damping": best,
            "methods": self._compared(halves, on_half[best], quality["lds"]),
            "lds_by_damping": [{"damping": damping, "lds": lds} for damping, lds in on_half.items()],
            "lds_tuning_half": on_half[best],
            "lds_held_out": quality["lds"],
            "lds_held_out_default": before,
            "default_damping": self.index.default_damping,
        }
        return best, quality

    def _compared(self, halves: Sequence[Retrainings], own: float, held_out: float) -> list[Json]:
        """Return the LDS on both halves of this index and of those it is compared with, best on the tuning half first."""
        fit = self.spec.fit.method.type
        found: list[Json] = [{"index": None, "method": fit, "lds_tuning_half": own, "lds_held_out": held_out}]
        for rival in self.spec.rivals:
            scores = self._scores_of(open_index(rival.folder, rival.fit, device=self.device), None)
            lds = [linear_datamodeling_score(scores, half).lds for half in halves]
            entry = {"index": rival.id, "method": rival.fit.method.type}
            found.append({**entry, "lds_tuning_half": lds[0], "lds_held_out": lds[1]})
        return sorted(found, key=lambda entry: -float(entry["lds_tuning_half"]))

    def _calibrated(self, bank: tuple[BankRef, Retrainings], scores: np.ndarray) -> ServedCalibration | None:
        try:
            return fit_served(scores, bank[1], self.full)
        except InvalidInputError:
            return None  # too few subsets for halves; the quality says so by its null

    def _mislabel(self) -> Json | None:
        if self.spec.mislabelled is None:
            return None
        flipped = np.isin(self.rows, self.index.context.source.reader.matching(self.spec.mislabelled))
        return mislabel_auc(self.index.self_influence()[self.rows], flipped).as_json()

    def _mixture(self, scores: np.ndarray) -> Json | None:
        if self.spec.source is None:
            return None
        field_name, training = self.spec.source, self.index.context.source.reader
        asked = self.index.context.source_of(self.spec.queries.folder, self.spec.queries.spec).reader
        sources = []
        for reader, rows in ((training, self.rows), (asked, np.asarray(self.spec.rows))):
            sources.append(np.array([str(value) for value in reader.metadata(field_name, rows)]))
        return mixture_check(scores, *sources, k=min(_TOP_OF_MIXTURE, len(self.rows))).as_json()


@dataclass
class _Seeds:
    """Sets that are retrained with the same seeds.

    Attributes:
        kept: which of the examples that are trained on each set keeps, (num_training,) bool, everything first.
        train: says which rows of the data set these are.
    """

    seeds: int
    kept: list[np.ndarray]
    train: TrainSpec

    @property
    def runs(self) -> list[Run]:
        return [Run(self._of_dataset(kept), seed) for kept in self.kept for seed in range(self.seeds)]

    def _of_dataset(self, kept: np.ndarray) -> np.ndarray:
        mask = self.train.everything()
        mask[mask] = kept
        return mask


class _SetsToRetrain:
    """The explicit sets of an evaluation, and what is measured with them."""

    def __init__(self, pipeline: EvaluationPipeline) -> None:
        self._pipeline, spec = pipeline, pipeline.spec
        self.by_seeds: dict[str, _Seeds] = {}
        everything = np.ones(len(pipeline.rows), bool)
        if spec.loo is not None:
            sets = [everything, *self._loo_sets()]
            self.by_seeds["loo"] = _Seeds(spec.loo.seeds, sets, spec.train)
        if spec.removal is not None:
            self._sizes = sorted(set(spec.removal.top))
            masks = [removal_masks(ranking, self._sizes) for ranking in self._rankings.values()]
            sets = [everything, *np.concatenate(masks).reshape(-1, len(everything))]
            self.by_seeds["removal"] = _Seeds(spec.removal.seeds, sets, spec.train)

    def measured(self, scores: np.ndarray, files: list[Path]) -> Json:
        """Return what the sets' retrainings say, given all shards' files, of which theirs are the last."""
        pipeline, found = self._pipeline, {}
        place = len(pipeline._of_banks)
        for name, sets in self.by_seeds.items():
            count = len(run_groups(pipeline.trainer, sets.runs, "resample"))
            retrained = Retrained(pipeline.trainer.network, files[place : place + count])
            place += count
            values = retrained.values(pipeline.batch, pipeline.spec.fit.measurement)
            shaped = values.reshape(len(sets.kept), sets.seeds, -1)  # (sets, seeds, queries)
            full = np.nanmean(shaped[0], axis=0)
            if not np.isfinite(full).all():
                raise InvalidInputError("training on everything diverged", "/recipe")
            found[name] = self._loo(scores, sets, shaped, full) if name == "loo" else self._removal(shaped, full)
        return found

    def _loo(self, scores: np.ndarray, sets: _Seeds, values: np.ndarray, full: np.ndarray) -> Json:
        return leave_one_out(scores, Retrainings(np.stack(sets.kept[1:]), values[1:]), full).as_json()

    def _removal(self, values: np.ndarray, full: np.ndarray) -> Json:
        names, queries = list(self._rankings), len(next(iter(self._rankings.values())))
        shaped = values[1:].reshape(len(names), queries, len(self._sizes), values.shape[1], -1)
        own = {
            name: np.stack([shaped[number, query, :, :, query] for query in range(queries)])
            for number, name in enumerate(names)
        }
        return removal_result(self._sizes, own, full[:queries], names[0]).as_json()

    def _loo_sets(self) -> list[np.ndarray]:
        """Return sets without one example each: evenly spread over the examples ordered by their mean absolute influence."""
        pipeline = self._pipeline
        assert pipeline.spec.loo is not None
        order = np.abs(pipeline.scores(None)).mean(0).argsort(kind="stable")
        n = len(order)
        return [np.arange(n) != place for place in order[evenly_spread(n, pipeline.spec.loo.examples)]]

    @cached_property
    def _rankings(self) -> dict[str, np.ndarray]:
        """Rankings (queries, num_training) by the method, at random, and by similarity of representations."""
        pipeline = self._pipeline
        assert pipeline.spec.removal is not None
        count = min(pipeline.spec.removal.queries, len(pipeline.batch))
        method = pipeline.spec.fit.method.type
        similarity = Representation(pipeline.index.context.checkpoint(0), "cosine")
        batches = pipeline.index.context.batches(0, pipeline.rows)
        rows = np.concatenate([similarity.encode_train(batch).rows.cpu().numpy() for batch in batches])
        asked = similarity.encode_query(pipeline.batch[:count]).rows.cpu().numpy()
        return {
            method: ranking_of(pipeline.scores(None)[:count]),
            "random": random_ranking(count, len(pipeline.rows), 0),
            "similarity": ranking_of(asked @ rows.T),
        }


def _summary(calibration: ServedCalibration) -> Json:
    """Return what clients see of a calibration."""
    found = calibration.as_json()
    return {key: found[key] for key in ("kind", "log_variance", "power", "subsets", "removed_share")} | {
        "slope": getattr(calibration.map, "slope", None),
        "intercept": getattr(calibration.map, "intercept", None),
    }
