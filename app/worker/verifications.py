"""The verification job: predictions of an index beside retraining without the very examples they are about."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from app.engine.operations import Operations
from attribution_core.data.batch import Batch
from attribution_core.progress import Progress
from attribution_core.sharding import Stage
from attribution_core.training.bank import Retrained, train_runs
from attribution_core.training.pipeline import Arrays, run_groups
from attribution_core.training.spec import Semantics, TrainSpec
from attribution_core.training.trainer import Run, Trainer

Json = dict[str, Any]


class VerificationPipeline:
    """Retrains on everything, and without each distinct set of examples that some prediction leaves out.

    Args:
        operations: answers the predictions.
        payload: the engine's own form of a counterfactual question.
        train: how the model is trained.
        seeds: each set is retrained with all of them.
    """

    def __init__(
        self,
        operations: Operations,
        payload: Json,
        train: TrainSpec,
        seeds: list[int],
        semantics: Semantics,
        device: str,
    ) -> None:
        self._operations, self._payload = operations, payload
        self.seeds, self.semantics = seeds, semantics
        self.trainer = Trainer(train, device)
        self.predicted = operations.predict(payload)
        self._sets = self._distinct_sets(train.dataset.num_examples)
        runs = [Run(kept, seed) for kept in self._sets.values() for seed in seeds]
        self._groups = run_groups(self.trainer, runs, semantics)

    def stages(self) -> list[Stage]:
        """Return the one stage."""
        return [Stage("retraining", tuple(self._groups))]

    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> Arrays:
        """Retrain one group."""
        return train_runs(self.trainer, self._groups[ordinal].runs, self.semantics, progress)

    def reduce(self, stage: str, shard_files: list[Path]) -> Arrays:
        """Return nothing: every group stands for itself."""
        return {}

    def conclude(self, files: list[Path], measurement: str) -> Json:
        """Return per query and subset the realised change of every seed, and what diverged."""
        retrained = Retrained(self.trainer.network, files)
        values = retrained.values(self._batch, measurement).reshape(len(self._sets), len(self.seeds), -1)
        changes = dict(zip(self._sets, values - values[0], strict=True))  # set: (seeds, queries)
        return {
            "retrainings": len(retrained.diverged),
            "diverged": int(retrained.diverged.sum()),
            "changes": [
                [changes[rows.tobytes()][:, query].tolist() for rows in of_query]
                for query, of_query in enumerate(self.predicted["rows"])
            ],
        }

    @cached_property
    def _batch(self) -> Batch:
        return self._operations.queries(self._payload)

    def _distinct_sets(self, n: int) -> dict[bytes, np.ndarray]:
        """Return which examples each set keeps, by the rows it leaves out; nothing left out comes first."""
        everything = np.ones(n, bool)
        sets = {np.empty(0, np.int64).tobytes(): everything}
        for of_query in self.predicted["rows"]:
            for rows in of_query:
                kept = everything.copy()
                kept[rows] = False
                sets[rows.tobytes()] = kept
        return sets
