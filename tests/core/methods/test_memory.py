"""Memory is set by the batch, and what would not fit is refused before it is computed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.architectures.build import build
from attribution_core.errors import InvalidInputError
from attribution_core.fit_spec import FitSpec
from attribution_core.methods import context as contexts
from attribution_core.methods.context import FitContext
from tests.core.methods.problems import MLP, Problem
from tests.core.methods.problems import problem as written
from tests.core.methods.test_language_model import specification

ROOT = Path(__file__).parents[3]
LOGRA = {"type": "logra", "projection": {"type": "factored", "dim": 64}}
WIDE = {"type": "grad_dot", "projection": {"type": "sjlt", "dim": 2048}}


def changed(spec: FitSpec, **changes: object) -> FitContext:
    return FitContext(FitSpec.model_validate({**spec.model_dump(), **changes}))


def test_whole_gradients_of_a_large_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = specification(tmp_path)
    parameters = changed(spec).checkpoint(0).capture.num_parameters
    monkeypatch.setattr(contexts, "MAX_GRADIENT_BYTES", 4 * 3 * contexts.RECALL_QUERIES * parameters - 1)
    with pytest.raises(InvalidInputError, match="fewer layers") as caught:
        changed(spec).checkpoint(0)
    assert caught.value.pointer == "/layers"
    assert changed(spec, layers=["!output"]).checkpoint(0).capture.num_parameters < parameters
    assert changed(spec, method=LOGRA).checkpoint(0).capture.num_parameters == parameters


def test_a_large_vocabulary_makes_batches_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = specification(tmp_path)
    assert changed(spec, batch_size=None).batch_size(0) > 5
    longest = max(len(row) for row in changed(spec).source.batch(range(8)).inputs)
    monkeypatch.setattr(contexts, "_OUTPUT_BYTES", 5 * 4 * 4 * 257 * longest)
    assert changed(spec, batch_size=None).batch_size(0) == 5


@pytest.mark.parametrize("method", ["gauss_newton", "datainf", "ekfac"])
def test_training_gradients_that_queries_keep_are_counted(problem: Problem, method: str) -> None:
    index = problem.fit("kept", method={"type": method})
    before = index.bytes
    index.query(problem.queries(), None)
    kept = index.context.pseudo_gradients._kept._kept
    assert sorted(kept) == ([] if method == "ekfac" else [0])
    assert index.bytes - before == sum(rows.nbytes for rows in kept.values())


@pytest.mark.parametrize("method", ["gauss_newton", "datainf"])
def test_training_gradients_of_an_ensemble_are_kept_within_a_bound(
    ensemble: Problem, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit is made again, once for a call, and changes no score."""
    index = ensemble.fit("bounded", method={"type": method})
    queries, rows = ensemble.queries(), np.arange(index.num_examples)
    expected = index.scores(index.query(queries, None), rows, rescore=True)
    kept, everything = index.context.pseudo_gradients._kept, index.context.pseudo_gradients.held_bytes
    kept._limit = everything // 2
    kept._kept.clear()
    for _ in range(2):
        assert np.array_equal(index.scores(index.query(queries, None), rows, rescore=True), expected)
        assert 0 < index.context.pseudo_gradients.held_bytes <= everything // 2
    made, draws = list[int](), index.context.pseudo_gradients.draws

    def noted(number: int, *given: Any) -> Any:
        made.append(number)
        return draws(number, *given)

    monkeypatch.setattr(index.context.pseudo_gradients, "draws", noted)
    index.query(queries, None)
    assert made == [number for number in range(len(index.members)) if number not in kept._kept]


def fit_wide_rows(folder: Path, n: int) -> int:
    """Fit an index of n rows of 2,048 numbers and return the largest resident size of this process so far, in bytes."""
    inputs, targets = torch.randn(n, 5), torch.arange(n) % 3
    written(folder, inputs, targets, MLP, modules=[build(MLP)]).fit("wide", method=WIDE, shard_size=256, batch_size=64)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_fit_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Whatever is done once all rows are there, recall among it, takes them block by block."""
    peaks = []
    for n in (1000, 4000):
        call = f"print(fit_wide_rows(Path({str(tmp_path / str(n))!r}), {n}))"
        command = [sys.executable, "-c", f"from {__name__} import *; {call}"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    rows = 3000 * 2048 * 4
    assert peaks[1] - peaks[0] < rows / 5
