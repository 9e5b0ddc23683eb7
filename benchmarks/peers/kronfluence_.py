"""kronfluence's EK-FAC: `fit_all_factors`, then `compute_pairwise_scores`; several checkpoints are averaged by hand."""

from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn

from benchmarks.peers.base import BATCH, Peer, Problem, run

_QUERIES = 50


class _Task(Task):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, targets = batch
        output = model(inputs)
        return (self.problem.sampled_loss(output) if sample else self.problem.loss(output, inputs, targets)).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        # Scores are ∇m·H⁻¹∇ℓ: with the sign turned, an example that raises the measurement scores above 0.
        inputs, targets = batch
        return -self.problem.measure(model(inputs), inputs, targets).sum()


class Kronfluence(Peer):
    """EK-FAC with sampled labels, in float32."""

    def fit(self) -> None:
        """Fit covariances, eigenvectors and eigenvalues."""
        (number,) = self.checkpoints
        task = _Task(self.problem)
        self.analyzer = Analyzer(
            "run",
            prepare_model(self.problem.module(number), task),
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=str(self.folder),
        )
        self.analyzer.fit_all_factors(
            "factors",
            self.problem.train,
            per_device_batch_size=BATCH,
            factor_args=FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )

    def scores(self, damping: float | None) -> np.ndarray:
        """Return all pairs; a damping of -1 is its heuristic, 0.1 × the mean eigenvalue of each layer."""
        arguments = ScoreArguments()
        if damping is not None:
            arguments.damping_factor = None if damping < 0 else damping
        self.analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            self.problem.query,
            self.problem.train,
            per_device_query_batch_size=_QUERIES,
            per_device_train_batch_size=BATCH,
            score_args=arguments,
            overwrite_output_dir=True,
        )
        return self.analyzer.load_pairwise_scores("scores")["all_modules"].to(torch.float32).numpy()


if __name__ == "__main__":
    run(Kronfluence, "kronfluence")
