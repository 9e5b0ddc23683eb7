"""captum: Arnoldi influence functions, and TracIn on the given checkpoints (a gradient dot product)."""

from typing import Any

import numpy as np
import torch
from captum.influence import TracInCP
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.peers.base import Peer, run


class Captum(Peer):
    """Options: `type` (`arnoldi` or `tracin`), and for Arnoldi `dim` and `rank`."""

    def prepare(self, damping: float | None) -> None:
        """Build the influence function, whose damping is part of its construction."""
        (number,) = self.checkpoints
        problem = self.problem

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            return problem.loss(output, targets, targets).sum()

        def measured(output: Tensor, targets: Tensor) -> Tensor:
            # With the sign turned, an example that raises the measurement scores above 0.
            return -problem.measure(output, targets, targets).sum()

        given: dict[str, Any] = {"loss_fn": loss, "test_loss_fn": measured, "sample_wise_grads_per_batch": True}
        module, train = problem.module(number), problem.loader("train")
        if self.options["type"] == "tracin":
            self.influence = TracInCP(module, train, [str(problem.path(number))], _load, **given)
            return
        if damping is not None:
            # Its Hessian is a sum over examples.
            given["hessian_reg"] = damping * len(problem.train)
        self.influence = ArnoldiInfluenceFunction(
            module,
            train,
            str(problem.path(number)),
            _load,
            batch_size=None,
            projection_dim=self.options["rank"],
            arnoldi_dim=self.options["dim"],
            **given,
        )

    def fit(self) -> None:
        """Nothing is free of the damping."""

    def scores(self, damping: float | None) -> np.ndarray:
        """Return all pairs."""
        return np.asarray(self.influence.influence(self.problem.loader("query")).detach())


def _load(module: nn.Module, path: str) -> float:
    module.load_state_dict(load_file(path))
    torch.manual_seed(0)
    return 1.0


if __name__ == "__main__":
    run(Captum, "captum")
