"""Stored gradients lie along the axes of their curvature, which no answer tells."""

from pathlib import Path

import numpy as np
import pytest
import torch

from attribution_core.arrays import mapped_arrays, read_arrays
from attribution_core.fit_spec import BaseRef
from attribution_core.methods.artifact import FACTORS_FILE, GRADIENTS_FOLDER
from attribution_core.methods.base import GradientMethod
from attribution_core.methods.context import FitContext
from attribution_core.methods.extend import extend
from attribution_core.methods.fit import FitPipeline, run
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress, Progress
from tests.core.methods.problems import SMALL, Problem, images, relative_error
from tests.core.methods.test_extend import FIRST, SECOND, part
from tests.core.methods.test_scores import scores

METHODS = (
    {"type": "ekfac", "whole_layers": 0},
    {"type": "ekfac", "whole_layers": 30},  # the last layer alone
    {"type": "ekfac", "whole_layers": 0, "axes": "positions"},
    {"type": "kfac"},
    {"type": "gauss_newton", "whole_layers": 0},
)
FACTORS = {"layout": "factors"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return images(tmp_path_factory.mktemp("pictures"))


def names(index: LoadedIndex) -> set[str]:
    return {name for path in (index.folder / GRADIENTS_FOLDER).iterdir() for name in mapped_arrays(path)}


def is_turned(index: LoadedIndex) -> bool:
    return any(".turned." in name for name in names(index))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", ["ensemble", "pictures"])
def test_answers_are_those_of_gradients_as_they_are(
    kind: str, method: dict[str, object], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Problem = request.getfixturevalue(kind)
    index = given.fit("turned", method=method, store=FACTORS)
    assert is_turned(index)
    monkeypatch.setattr(FitContext, "turns", False)
    plain = given.fit("plain", method=method, store=FACTORS)
    assert not is_turned(plain)
    groups = [np.arange(5), np.array([7, 11])]
    for damping in (None, 0.5):
        assert relative_error(scores(index, given, damping), scores(plain, given, damping)) < 1e-5
        queries = [each.query(given.queries(), damping) for each in (index, plain)]
        effects = [each.group_effects(q, groups, rescore=True) for each, q in zip((index, plain), queries, strict=True)]
        assert relative_error(*effects) < 1e-5
        if method["type"] != "kfac":
            newton = [each.newton_effects(q, groups) for each, q in zip((index, plain), queries, strict=True)]
            assert relative_error(*newton) < 1e-5
        found = [each.attribute(q, 5, None, rescore=True) for each, q in zip((index, plain), queries, strict=True)]
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one.positive.rows, other.positive.rows)
            np.testing.assert_array_equal(one.negative.rows, other.negative.rows)
    np.testing.assert_allclose(index.self_influence(), plain.self_influence(), rtol=1e-5)


def test_the_axes_are_the_eigenvectors_of_inputs(problem: Problem) -> None:
    """The negative control: scores of turned gradients along the parameters' own axes are others."""
    method = METHODS[0]
    index = problem.fit("turned", method=method, store=FACTORS)
    plain = index.members[0].curvature
    expected = scores(index, problem)
    stored = mapped_arrays(index.folder / GRADIENTS_FOLDER / "00000.safetensors")
    kept = torch.from_numpy(np.array(stored["0.0.turned.inputs"]))[:, 0]
    axes = plain.basis.rotations[0].inputs[0]
    inputs = torch.cat([problem.inputs[:16].float(), torch.ones(16, 1)], 1)
    inputs /= (inputs @ axes).abs().amax(1, keepdim=True)
    torch.testing.assert_close(kept, inputs @ axes, atol=1e-5, rtol=1e-5)
    for member in index.members:
        member.turned = False
    assert relative_error(scores(index, problem), expected) > 0.1


def test_shards_of_a_worker_that_did_not_turn_are_turned_when_read(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = problem.fit("turned", method=METHODS[0], store=FACTORS)

    class Mixed(FitPipeline):
        def run_shard(self, stage: str, ordinal: int, progress: Progress) -> dict[str, np.ndarray]:
            with monkeypatch.context() as patched:
                if stage == "features" and ordinal in (0, 2):
                    patched.setattr(GradientMethod, "rotations", None)
                return super().run_shard(stage, ordinal, progress)

    run(Mixed(index.spec, tmp_path / "work"), tmp_path / "mixed", NoProgress())
    mixed = LoadedIndex(tmp_path / "mixed", index.spec)
    assert {".turned." in name for name in names(mixed)} == {True, False}
    assert relative_error(scores(mixed, problem), scores(index, problem)) < 1e-5


@pytest.mark.parametrize("turns", [True, False])
def test_an_extension_keeps_the_axes_of_what_it_extends(
    problem: Problem, turns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = part(problem, tmp_path / "first", FIRST)
    second = part(problem, tmp_path / "second", SECOND, first, FIRST)
    with monkeypatch.context() as patched:
        patched.setattr(FitContext, "turns", turns)
        base = problem.fit("base", method=METHODS[0], store=FACTORS, dataset=first)
    before = BaseRef(folder=base.folder, fingerprint=base.spec.fingerprint(), num_examples=FIRST, fitted_examples=FIRST)
    spec = base.spec.model_copy(update={"dataset": second, "base": before})
    extend(spec, tmp_path / "work", tmp_path / "extended", NoProgress())
    extended = LoadedIndex(tmp_path / "extended", spec)
    assert is_turned(extended) is turns
    assert all(".turned." in name for name in names(extended)) is turns
    rows = np.arange(SECOND)
    found = extended.scores(extended.query(problem.queries(), None), rows, rescore=True)
    expected = base.scores(base.query(problem.queries(), None), rows[:FIRST], rescore=True)
    assert relative_error(found[:, :FIRST] * SECOND, expected * FIRST) < 1e-5


@pytest.mark.parametrize(
    ("method", "store"),
    [
        ({"type": "ekfac", "whole_layers": 0}, {"layout": "factors", "dtype": "int8"}),
        ({"type": "diagonal"}, FACTORS),
        ({"type": "grad_dot"}, FACTORS),
    ],
    ids=str,
)
def test_bytes_and_other_curvatures_are_not_turned(
    problem: Problem, method: dict[str, object], store: dict[str, object]
) -> None:
    index = problem.fit("index", method={**method, "projection": SMALL}, store=store)
    assert not is_turned(index)
    assert "0.turned" not in read_arrays(index.folder / FACTORS_FILE)
