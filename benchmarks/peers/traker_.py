"""traker's TRAK in float32 with its CPU projector."""

import shutil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType

from benchmarks.peers.base import BATCH, Peer, Problem, run


class _Output(AbstractModelOutput):
    """The task's log-odds."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def get_output(self, model: nn.Module, weights: Any, buffers: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-odds of one example."""
        inputs, targets = inputs.unsqueeze(0), targets.unsqueeze(0)
        output = torch.func.functional_call(model, (weights, buffers), (inputs,))
        return self.problem.task.log_odds(output, self.problem.batch(inputs, targets)).sum()

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
        """Return `1 - p` of every example."""
        inputs, targets = batch
        output = torch.func.functional_call(model, (weights, buffers), (inputs,))
        return self.problem.task.residual(output, self.problem.batch(inputs, targets)).detach().unsqueeze(-1)


class Trak(Peer):
    """TRAK over checkpoints; options: `dim`."""

    @classmethod
    def ensembles(cls, options: dict[str, Any]) -> bool:
        """It takes several checkpoints."""
        return True

    def fit(self) -> None:
        """Featurize the training set with every checkpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)  # it would go on from what an earlier run left there
        module = self.problem.module(self.checkpoints[0])
        projector = BasicProjector(
            grad_dim=sum(parameter.numel() for parameter in module.parameters()),
            proj_dim=self.options["dim"],
            seed=0,
            proj_type=ProjectionType.rademacher,
            device="cpu",
            dtype=torch.float32,
        )
        self.states = [self.problem.module(number).state_dict() for number in self.checkpoints]
        self.traker = TRAKer(
            model=module,
            task=_Output(self.problem),
            train_set_size=len(self.problem.train),
            save_dir=str(self.folder),
            device="cpu",
            projector=projector,
            proj_dim=None,
            use_half_precision=False,
            logging_level=40,
        )
        for number, state in enumerate(self.states):
            self.traker.load_checkpoint(state, model_id=number)
            for batch in self.problem.loader("train"):
                self.traker.featurize(batch=batch, num_samples=len(batch[0]))

    def prepare(self, damping: float | None) -> None:
        """Invert the kernel, whose scale depends on the projection: dampings are multiples of its mean diagonal."""
        rate = 0.0
        if damping is not None:
            self.traker.saver.load_current_store(0)
            rows = np.array(self.traker.saver.current_store["grads"], np.float64)
            rate = damping * float(np.square(rows).sum() / rows.shape[1])
        self.traker.score_computer.lambda_reg = rate
        for number in range(len(self.states)):
            # Features that are marked as finalised would be kept at the former damping.
            self.traker.saver.model_ids[number]["is_finalized"] = 0
        self.traker.finalize_features()

    def scores(self, damping: float | None) -> np.ndarray:
        """Return all pairs."""
        name = f"queries-{damping}"
        for number, state in enumerate(self.states):
            self.traker.start_scoring_checkpoint(name, state, number, len(self.problem.query))
            for batch in self.problem.loader("query", BATCH):
                self.traker.score(batch=batch, num_samples=len(batch[0]))
        return np.array(self.traker.finalize_scores(name)).T

    def bytes_per_example(self) -> float:
        """Return the features' size."""
        return 4.0 * self.options["dim"] * len(self.checkpoints)


if __name__ == "__main__":
    run(Trak, "traker")
