"""captum: Arnoldi influence functions, and TracIn on the given checkpoints (a gradient dot product)."""

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from captum._utils.sample_gradient import SUPPORTED_MODULES
from captum.influence import TracInCP
from captum.influence._core import arnoldi_influence_function
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction, _parameter_arnoldi
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.peers.base import BATCH, Peer, run

# Each example's backward pass goes through its whole batch.
_SMALL_BATCH = 10


class Captum(Peer):
    """Options: `type` (`arnoldi` or `tracin`), and for Arnoldi `dim` and `rank`."""

    def prepare(self, damping: float | None) -> None:
        """Build the influence function, whose damping is part of its construction."""
        (number,) = self.checkpoints
        problem = self.problem
        # It takes the gradients of a batch at once where all layers are linear or convolutions, and else one after the other, from a loss per example.
        module = _numeric_padding(problem.module(number))
        layers = [part for part in module.modules() if [*part.parameters(recurse=False)]]
        batched = all(isinstance(layer, tuple(SUPPORTED_MODULES)) for layer in layers)

        def reduced(losses: Tensor) -> Tensor:
            return losses.sum() if batched else losses

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            return reduced(problem.loss(output, targets, targets))

        def measured(output: Tensor, targets: Tensor) -> Tensor:
            # With the sign turned, an example that raises the measurement scores above 0.
            return reduced(-problem.measure(output, targets, targets))

        given: dict[str, Any] = {"loss_fn": loss, "test_loss_fn": measured, "sample_wise_grads_per_batch": batched}
        self.batch = BATCH if batched else _SMALL_BATCH
        train = problem.loader("train", self.batch)
        if self.options["type"] == "tracin":
            self.influence = TracInCP(module, train, [str(problem.path(number))], _load, **given)
            return
        if damping is not None:
            # Its Hessian is a sum over examples.
            given["hessian_reg"] = damping * len(problem.train)
        with patch.object(arnoldi_influence_function, "_parameter_arnoldi", self._basis):
            self.influence = ArnoldiInfluenceFunction(
                module,
                train,
                str(problem.path(number)),
                _load,
                batch_size=None,
                hessian_dataset=problem.loader("train"),
                projection_dim=self.options["rank"],
                arnoldi_dim=self.options["dim"],
                **given,
            )

    def _basis(self, *given: Any) -> tuple[list[tuple[Tensor, ...]], Tensor]:
        """Return the Krylov basis and the Hessian in it, made once: the damping, which it is built anew for, comes after."""
        if self.basis is None:
            self.basis = _parameter_arnoldi(*given)
        vectors, hessian = self.basis
        return list(vectors), hessian.clone()

    def fit(self) -> None:
        """Forget an earlier basis; what is free of the damping is made with the rest."""
        self.basis: tuple[list[tuple[Tensor, ...]], Tensor] | None = None

    def scores(self, damping: float | None) -> np.ndarray:
        """Return all pairs."""
        return np.asarray(self.influence.influence(self.problem.loader("query", self.batch)).detach())


def _numeric_padding(module: nn.Module) -> nn.Module:
    """Write the padding "same" of a network's convolutions, all of odd kernels, as numbers: it does not take the word."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.padding == "same":
            layer.padding = tuple(
                dilation * (size // 2) for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
            )
    return module


def _load(module: nn.Module, path: str) -> float:
    module.load_state_dict(load_file(path))
    torch.manual_seed(0)
    return 1.0


if __name__ == "__main__":
    run(Captum, "captum")
