"""Further problems, on which defaults were tested that were chosen on the benchmark's: other sizes, data, optimisers and lengths of training.

They have fewer retrainings than the benchmark's, and their truth, some minutes each, is not committed.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.retraining import Recipe
from benchmarks.workloads import WORKLOADS, Workload, images, pieces


class Variant(Workload):
    """A workload whose truth is made where it is asked for."""

    @property
    def truth(self) -> Path:
        """Where the truth is: beside the checkpoints."""
        return self.folder / "truth.npz"


_MLP, _SGD = WORKLOADS["mnist-mlp"].architecture, WORKLOADS["mnist-mlp"].recipe
_SHORT_SGD, _ADAMW = WORKLOADS["mnist-cnn"].recipe, WORKLOADS["austen-lm"].recipe


def _mlp(*hidden: int) -> dict[str, Any]:
    return {**_MLP, "arguments": {**_MLP["arguments"], "hidden": hidden}}


_CNN = {"name": "cnn", "arguments": {"input_shape": [1, 28, 28], "channels": [8, 16], "num_classes": 10}}
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("mnist-mlp-short", _MLP, images("mnist", 1000, 200, True), replace(_SGD, epochs=5), 50, 4, 100),
        Variant("mnist-mlp-adamw", _MLP, images("mnist", 1000, 200, True), Recipe("adamw", 3e-3, 0.01, 20, 50), 50, 4, 100),
        Variant("mnist-mlp-deep", _mlp(64, 64, 64, 64), images("mnist", 2000, 200, True), _SGD, 50, 4, 50),
        Variant("fashion-mlp-wide", _mlp(256, 128), images("fashion", 1000, 200, True), _SGD, 50, 4, 50),
        Variant("fashion-mlp-8000", _MLP, images("fashion", 8000, 200, True), Recipe("sgd", 0.05, 5e-4, 10, 50), 50, 2, 50),
        # As in examples/demo.py.
        Variant("mnist-cnn-4000", _CNN, images("mnist", 4000, 200, False), Recipe("sgd", 0.1, 0.01, 6, 64), 40, 2, 10),
        Variant("fashion-cnn-narrow", _CNN, images("fashion", 2000, 200, False), _SHORT_SGD, 50, 2, 10),
        Variant(
            "austen-lm-300",
            WORKLOADS["austen-lm"].architecture,
            pieces(300, 60),
            _ADAMW,
            50,
            2,
            10,
            "causal_lm",
            "log_likelihood",
        ),
    )
}  # fmt: skip
