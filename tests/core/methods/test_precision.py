"""Passes in bfloat16: how far scores and gradients are from those in float32, and that what is kept is float32."""

from pathlib import Path

import numpy as np
import pytest
import torch

from attribution_core.arrays import read_arrays
from attribution_core.fit_spec import FitSpec
from attribution_core.methods.context import FitContext
from tests.core.methods.problems import SMALL
from tests.core.methods.test_language_model import ALL, fitted, specification

METHODS = {
    "grad_dot": {"type": "grad_dot", "projection": SMALL},
    "ekfac": {"type": "ekfac", "projection": SMALL},
    "logra": {"type": "logra", "projection": {"type": "factored", "dim": 512, "seed": 1}},
}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("method", METHODS)
def test_scores_agree_with_those_in_float32(tmp_path: Path, method: str) -> None:
    spec = specification(tmp_path)
    scores = []
    for precision in ("float32", "bfloat16"):
        index = fitted(spec, tmp_path / precision, method=METHODS[method], precision=precision)
        query = index.query(index.context.source.batch(np.array([3, 0, 7])), None)
        scores.append(index.scores(query, ALL, rescore=True))
        kept = read_arrays(tmp_path / precision / "index" / "factors.safetensors")
        assert {value.dtype for value in kept.values()} <= {np.dtype(np.float32)}
    assert not np.array_equal(*scores)
    assert cosine(*scores) > 0.99
    assert all(cosine(a, b) > 0.99 for a, b in zip(*scores, strict=True))


def test_gradients_are_float32_and_close(tmp_path: Path) -> None:
    spec = specification(tmp_path)
    found = {}
    for precision in ("float32", "bfloat16"):
        context = FitContext(FitSpec.model_validate({**spec.model_dump(), "precision": precision}))
        checkpoint, batch = context.checkpoint(0), context.source.batch(ALL)
        run = checkpoint.run(batch)
        assert run.output.dtype == torch.float32
        assert torch.equal(run.output, checkpoint.output(batch))
        found[precision] = run.gradients(checkpoint.task.loss(run.output, batch))
    for exact, lowered in zip(found["float32"], found["bfloat16"], strict=True):
        assert lowered.inputs.dtype == torch.float32
        assert cosine(lowered.materialise().numpy(), exact.materialise().numpy()) > 0.99, exact.block.name


def test_precision_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    spec = specification(tmp_path)
    lowered = FitSpec.model_validate({**spec.model_dump(), "precision": "bfloat16"})
    assert lowered.fingerprint() != spec.fingerprint()
