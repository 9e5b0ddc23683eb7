"""dattri: TRAK, LoGra and EK-FAC."""

import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.algorithm.logra import LoGraAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn

from benchmarks.peers.base import Peer, functional, run


class Dattri(Peer):
    """Options: `type` (`trak`, `logra` or `ekfac`) and `dim`."""

    @classmethod
    def ensembles(cls, options: dict[str, Any]) -> bool:
        """TRAK takes several checkpoints; EK-FAC refuses and LoGra reads the first only."""
        return bool(options["type"] == "trak")

    def fit(self) -> None:
        """Compute what the default damping needs; an attributor's damping is part of its construction."""
        problem = self.problem
        # LoGra takes the cross-entropy of what a network returns as a query's loss, unless that brings its own, as transformers' language models do.
        loss = problem.loss if problem.is_language_model and self.options["type"] == "logra" else None
        dims = problem.train.tensors[0].dim()
        modules = [_Batching(problem.module(number), dims, loss) for number in self.checkpoints]
        self.module, states = modules[0], [module.state_dict() for module in modules]
        match self.options["type"]:
            case "trak":
                self.task = AttributionTask(functional(problem, self.module, problem.log_odds), self.module, states)
            case "logra":
                self.task = AttributionTask(self._mean_loss, self.module, states)
            case _:
                # Gradients of a query's loss are those of its measurement up to a factor, which a rank does not see.
                self.task = AttributionTask(functional(problem, self.module, problem.loss), self.module, states)

    def prepare(self, damping: float | None) -> None:
        """Cache the training set."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        given = {} if damping is None else {self._damping_name(): damping}
        match self.options["type"]:
            case "trak":
                self.attributor = TRAKAttributor(
                    self.task,
                    self._probability,
                    projector_kwargs={"device": "cpu", "proj_dim": self.options["dim"]},
                    **given,
                )
            case "logra":
                # Batch metadata is read back from the working folder: one of its own keeps another run's out.
                self.attributor = LoGraAttributor(
                    self.task, proj_dim=self.options["dim"], offload="none", cache_dir=str(self.folder), **given
                )
            case _:
                self.attributor = IFAttributorEKFAC(self.task, **given)
        self.attributor.cache(self.problem.loader("train"))

    def scores(self, damping: float | None) -> np.ndarray:
        """Return all pairs."""
        if self.options["type"] == "trak":
            return self.attributor.attribute(self.problem.loader("query")).T.detach().numpy()
        found = self.attributor.attribute(self.problem.loader("train"), self.problem.loader("query"))
        return found.T.detach().numpy()

    def _mean_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], device: str) -> Tensor:
        output = model(batch[0])
        return output.loss if hasattr(output, "loss") else self.problem.loss(output, *batch).mean()

    def _damping_name(self) -> str:
        return "regularization" if self.options["type"] == "trak" else "damping"

    def _probability(self, parameters: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = (part.unsqueeze(0) for part in batch)
        output = torch.func.functional_call(self.module, parameters, (inputs,))
        return 1 - self.problem.task.residual(output, self.problem.batch(inputs, targets)).squeeze()


class _Batching(nn.Module):
    """A network that is also called with one example that has no batch dimension, as LoGra does to learn shapes; with a loss it returns that too."""

    def __init__(self, network: nn.Module, dims: int, loss: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.network, self.dims, self.loss = network, dims, loss

    def forward(self, inputs: Tensor) -> Any:
        batch = inputs if inputs.dim() == self.dims else inputs.unsqueeze(0)
        output = self.network(batch)
        return (
            output if self.loss is None else SimpleNamespace(logits=output, loss=self.loss(output, batch, batch).mean())
        )


if __name__ == "__main__":
    run(Dattri, "dattri")
