"""The verification job: predictions of an index beside retraining without the very examples they are about."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy.ext.asyncio import AsyncSession

from app.engine.cache import IndexCache
from app.engine.operations import Operations
from app.queries import questions
from app.queries.questions import Asked
from app.replay import plans as replays
from app.replay.service import verification_question
from app.worker.runner import Kind, Runner, Running, computed
from app.worker.sharded import assist, device_of, settle, shard_files, work_through
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
        payload: the question in the engine's own form.
        train: how the model is trained.
        seeds: each set is retrained with all of them.
        semantics: what leaving out means.
        device: where torch computes.
    """

    def __init__(
        self,
        operations: Operations,
        payload: Json,
        train: TrainSpec,
        seeds: Sequence[int],
        semantics: Semantics,
        device: str,
    ) -> None:
        self._operations, self._payload = operations, payload
        self.seeds, self.semantics = list(seeds), semantics
        self.trainer = Trainer(train, device)
        self._rows = operations.predictions(payload).rows
        self._sets = self._distinct_sets(train.everything())
        runs = [Run(kept, seed) for kept in self._sets.values() for seed in seeds]
        self._groups = run_groups(self.trainer, runs, semantics)

    def stages(self) -> list[Stage]:
        """Return the one stage."""
        return [Stage("retraining", tuple(self._groups))]

    def run_shard(self, stage: str, ordinal: int, progress: Progress) -> Arrays:
        """Retrain one group."""
        return train_runs(self.trainer, self._groups[ordinal].runs, self.semantics, progress)

    def reduce(self, stage: str, shard_files: Sequence[Path], progress: Progress) -> Arrays:
        """Return nothing: every group stands for itself."""
        return {}

    def conclude(self, files: Sequence[Path], measurement: str) -> Json:
        """Return predictions beside realised changes, as `VerificationOut` has them but for the queries' names."""
        retrained = Retrained(self.trainer.network, files)
        batch = self._operations.queries(self._payload)
        values = retrained.values(batch, measurement).reshape(len(self._sets), len(self.seeds), -1)
        changes = dict(zip(self._sets, values - values[0], strict=True))  # of each set, (seeds, queries)
        predicted = self._operations.predict(self._payload)
        return {
            "retrainings": len(retrained.diverged),
            "diverged": int(retrained.diverged.sum()),
            "results": [
                {
                    "output": output,
                    "predictions": [
                        _verified(subset, entry, changes[rows.tobytes()][:, query])
                        for subset, (entry, rows) in enumerate(zip(entries, self._rows[query], strict=True))
                    ],
                }
                for query, (output, entries) in enumerate(
                    zip(predicted["outputs"], predicted["predictions"], strict=True)
                )
            ],
        }

    def _distinct_sets(self, everything: np.ndarray) -> dict[bytes, np.ndarray]:
        """Return which examples each set keeps, by the rows it leaves out of everything; nothing left out comes first."""
        sets = {np.empty(0, np.int64).tobytes(): everything}
        for of_query in self._rows:
            for rows in of_query:
                kept = everything.copy()
                kept[rows] = False
                sets[rows.tobytes()] = kept
        return sets


def _verified(subset: int, entry: Json, realised: np.ndarray) -> Json:
    """Return one prediction beside the realised changes (seeds,), not a number where a retraining diverged."""
    finished = realised[np.isfinite(realised)]
    noise = float(finished.std(ddof=1) / len(finished) ** 0.5) if len(finished) > 1 else None
    return {
        "subset": subset,
        "removed": entry["removed"],
        "predicted_change": entry["change"],
        "interval": entry["interval"],
        "calibrated": entry["calibrated"],
        "realised_change": float(finished.mean()) if len(finished) else None,
        "seed_noise": noise,
        "realised_by_seed": [float(value) if np.isfinite(value) else None for value in realised],
    }


async def lead_verification(runner: Runner, running: Running) -> Callable[[AsyncSession], Awaitable[None]]:
    """Retrain, lay the predictions beside it, and return what keeps the result."""
    pipeline, work, asked = await _prepared(runner, running)
    await work_through(runner, running, pipeline, work)
    files = shard_files(work, pipeline.stages()[0])
    result = await computed(lambda: pipeline.conclude(files, asked.index.measurement), running.progress)
    assert isinstance(result, dict)
    running.progress.advance(0)
    for query, found in zip(asked.queries, result["results"], strict=True):
        found["query"] = query.model_dump(mode="json")

    async def effect(session: AsyncSession) -> None:
        await replays.finish_verification(session, running.job.resource_id, result)

    return effect


async def assist_verification(runner: Runner, running: Running) -> None:
    """Retrain some of the sets beside the worker that leads."""

    async def prepared() -> tuple[VerificationPipeline, Path]:
        pipeline, work, _ = await _prepared(runner, running)
        return pipeline, work

    await assist(runner, running, prepared)


async def _prepared(runner: Runner, running: Running) -> tuple[VerificationPipeline, Path, Asked]:
    async with runner.sessions() as session:
        replay, request, train = await replays.verification_plan(
            session, running.job.resource_id, runner.settings, runner.artifacts
        )
        question = verification_question(request)
        asked = await questions.resolved(session, runner.settings, runner.artifacts, replay.index_id or "", question)
    payload = {
        **asked.engine,
        "deleted": replay.left_out,  # what is deleted while the job runs changes no set
        "subsets": [questions.engine_subset(subset) for subset in request.subsets],
        **questions.group_question(asked, "additive", request.interval),
    }
    settings, device, work = runner.settings, device_of(runner), runner.artifacts.workspace(running.job.id)
    settle(work, [payload["artifact"], payload["damping"]])

    def made() -> VerificationPipeline:
        cache = IndexCache(runner.artifacts, settings.engine.memory_bytes, device)
        operations = Operations(cache, settings.limits.rescore_rows)
        return VerificationPipeline(operations, payload, train, request.seeds, request.semantics, device)

    pipeline = await computed(made, running.progress)
    assert isinstance(pipeline, VerificationPipeline)
    return pipeline, work, asked


VERIFICATION = Kind(lead_verification, assist_verification)
