"""Rows of vectors in an index: sketched in the whitened basis, as bits by default, and older indexes as they were."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.methods.artifact import FACTORS_FILE
from attribution_core.methods.base import GradientMethod
from attribution_core.methods.context import FitContext
from attribution_core.methods.extend import extend
from attribution_core.methods.fit import FitPipeline, fit
from attribution_core.methods.fitted import WHITENED
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress
from attribution_core.search import faiss_index
from attribution_core.search.faiss_index import VectorIndex
from tests.core.methods.problems import Problem, images, relative_error
from tests.core.methods.test_extend import based_on, part

ALL = np.arange(60)
WHITENED_METHODS = ("ekfac", "kfac", "diagonal", "gauss_newton")
FLOATS = {"layout": "vectors", "dtype": "float32"}


def error(given: Problem, method: dict[str, Any], store: dict[str, Any], damping: float | None = None) -> float:
    """Return how far scores of stored rows are from exact ones."""
    index = given.fit("index", method=method, store=store)
    query = index.query(given.queries(), damping)
    return relative_error(index.scores(query, ALL, rescore=False), index.scores(query, ALL, rescore=True))


@pytest.mark.parametrize("kind", WHITENED_METHODS)
def test_whitened_sketches_are_closer_to_exact_scores(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = images(tmp_path)
    found = {}
    for whitens in (True, False):
        if not whitens:
            monkeypatch.setattr(FitContext, "whitens", False)
        over = [
            error(given, {"type": kind, "damping": 0.01, "projection": {"dim": 128, "seed": seed}}, FLOATS)
            for seed in range(5)
        ]
        found[whitens] = float(np.mean(over))
    assert found[True] < 0.75 * found[False]


@pytest.mark.parametrize("kind", WHITENED_METHODS)
def test_self_influence_is_that_of_whole_gradients(kind: str, problem: Problem) -> None:
    method = {"type": kind, "damping": 0.1}
    whitened = problem.fit("whitened", method=method, store=FLOATS)
    whole = problem.fit("whole", method=method, store={"layout": "factors"})
    assert relative_error(whitened.self_influence(), whole.self_influence()) < 1e-5


def test_any_damping_may_be_asked_of_whitened_rows(problem: Problem) -> None:
    """Rows are whitened at the fit's damping; the query's side takes that back."""
    method = {"type": "ekfac", "damping": 0.1, "projection": {"dim": 4096}}
    for damping in (0.01, 0.1, 1.0):
        assert error(problem, method, FLOATS, damping) < 0.1


def test_bits_are_the_default_where_rows_are_whitened_and_scanned(problem: Problem) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], str, int]] = [
        ({"type": "ekfac"}, {}, "binary", 16_384),
        ({"type": "ekfac", "projection": {"dim": 64}}, {}, "binary", 64),
        ({"type": "ekfac"}, {"dtype": "float16"}, "float16", 1024),
        ({"type": "grad_dot"}, {}, "float32", 1024),
        ({"type": "grad_dot"}, {"dtype": "binary"}, "binary", 16_384),
        ({"type": "trak"}, {}, "float32", 1024),
        ({"type": "ekfac", "projection": {"type": "factored"}}, {}, "float32", 57),
        ({"type": "ekfac", "projection": {"type": "factored", "dim": 50}}, {"dtype": "binary"}, "binary", 46),
    ]
    for method, store, row_type, dim in cases:
        index = problem.fit("index", method=method, store={"layout": "vectors", **store})
        assert (index.context.row_type, index.dim) == (row_type, dim)
        assert (index.store.sizes is not None, index.store.dim) == (row_type == "binary", dim)
    for dtype, row_type in (("auto", "float32"), ("binary", "binary")):
        store, search = {"layout": "vectors", "dtype": dtype}, {"type": "ivf", "lists": 4}
        ivf = problem.fit("ivf", method={"type": "ekfac"}, store=store, search=search)
        assert (ivf.context.row_type, ivf.dim) == (row_type, 1024)
    assert problem.fit("factors", method={"type": "ekfac"}, store={}).context.row_type == "float32"


def test_held_bits_find_what_reading_them_finds(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """57 parameters leave most of 16,384 columns empty; 14 rows are scored again."""
    monkeypatch.setattr(faiss_index, "_MIN_REFINED", 0)
    index = problem.fit("index", method={"type": "ekfac"}, store={"layout": "vectors"})
    query = index.query(problem.queries(), None)
    scores = index.scores(query, ALL, rescore=False)
    found = index.attribute(query, 7, None, rescore=False)
    assert isinstance(index._search, VectorIndex)
    assert index.bytes < 60 * 4 * index.dim
    for row, answer in zip(scores, found, strict=True):
        assert answer.approximate
        np.testing.assert_array_equal(answer.positive.rows, np.argsort(-row, kind="stable")[:7])
        np.testing.assert_array_equal(answer.negative.rows, np.argsort(row, kind="stable")[:7])


def test_an_index_from_before_rows_were_whitened_answers_as_it_did(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its factors do not say that rows are whitened, so its queries are not; what its specification says has not changed."""
    method = {"type": "ekfac", "projection": {"dim": 256, "seed": 3}}
    with monkeypatch.context() as before:
        before.setattr(FitContext, "whitens", False)
        old = problem.fit("old", method=method, store=FLOATS)
        expected = old.scores(old.query(problem.queries(), None), ALL, rescore=False)
    assert not any(name.endswith(WHITENED) for name in read_arrays(old.folder / FACTORS_FILE))
    again = type(old)(old.folder, old.spec)
    found = again.scores(again.query(problem.queries(), None), ALL, rescore=False)
    np.testing.assert_array_equal(found, expected)
    new = problem.fit("new", method=method, store=FLOATS)
    assert relative_error(new.scores(new.query(problem.queries(), None), ALL, rescore=False), expected) > 1e-3


def test_rows_are_not_whitened_where_curvature_may_be_singular(problem: Problem) -> None:
    context = FitContext(problem.with_(method={"type": "ekfac", "damping": 0.0}, store=FLOATS))
    assert not context.whitens


def test_rows_stay_whitened_at_the_damping_that_their_factors_name(problem: Problem) -> None:
    """Whatever the default is."""
    index = problem.fit("index", method={"type": "ekfac", "damping": 0.1}, store=FLOATS)
    fitted = read_arrays(index.folder / FACTORS_FILE)
    assert fitted[f"0.{WHITENED}"] == np.float32(0.1)
    member = index.context.method(0, fitted | {f"0.{WHITENED}": np.array([3.0])})
    assert isinstance(member, GradientMethod)
    assert member.whitening is not None
    for block, expected in zip(member.whitening, member.curvature.whitening(3.0) or (), strict=True):
        assert torch.equal(block.sides.axes, expected.sides.axes)


@pytest.mark.parametrize("dtype", ["float32", "binary"])
def test_an_index_of_before_is_extended_as_it_is(
    dtype: str, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"type": "ekfac", "damping": 0.1, "residual_power": 1, "projection": {"dim": 256}}
    store = {"layout": "vectors", "dtype": dtype}
    first = part(problem, tmp_path / "first", 40)
    base = problem.with_(dataset=first, method=method, store=store)
    with monkeypatch.context() as before:
        before.setattr(FitContext, "whitens", False)
        fit(base, tmp_path / "work", tmp_path / "0", NoProgress())
        old = problem.fit("old", method=method, store=store)
    second = part(problem, tmp_path / "second", 60, first, 40)
    spec = problem.with_(dataset=second, method=method, store=store, base=based_on(tmp_path / "0", base))
    extend(spec, tmp_path / "work", tmp_path / "1", NoProgress())
    found = LoadedIndex(tmp_path / "1", spec)
    # Rows are sketches of gradients, which no factor has a part in.
    np.testing.assert_allclose(found.store.read(ALL), old.store.read(ALL), rtol=1e-4, atol=1e-6)


def test_a_fit_that_began_before_there_were_signs_goes_on(problem: Problem, tmp_path: Path) -> None:
    """Its shards have rows; an upgrade loses none of them."""
    spec = problem.with_(method={"type": "ekfac"}, store={"layout": "vectors"}, shard_size=25)
    pipeline = FitPipeline(spec, tmp_path / "work")
    *before, features = pipeline.stages()
    for stage in before:
        files = [tmp_path / f"{stage.name}-{shard.ordinal}" for shard in stage.shards]
        for shard, path in zip(stage.shards, files, strict=True):
            write_arrays(path, pipeline.run_shard(stage.name, shard.ordinal, NoProgress()))
        write_arrays(tmp_path / "work" / f"{stage.name}.safetensors", pipeline.reduce(stage.name, files, NoProgress()))
    shards = [pipeline.run_shard("features", shard.ordinal, NoProgress()) for shard in features.shards]
    method = pipeline.context.method(0, pipeline._fitted([stage.name for stage in before]))
    rows = method.encode_train(pipeline.context.source.batch(np.arange(25))).arrays()["rows"]
    old = {name: value for name, value in shards[0].items() if name not in ("signs", "lengths", "sums")}
    for name, first in (("new", shards[0]), ("old", old | {"rows": rows})):
        files = [tmp_path / f"{name}-{number}" for number in range(len(shards))]
        for path, arrays in zip(files, [first, *shards[1:]], strict=True):
            write_arrays(path, arrays)
        write_arrays(tmp_path / "work" / "features.safetensors", pipeline.reduce("features", files, NoProgress()))
        pipeline.assemble(tmp_path / name, files, NoProgress())
    stores = [LoadedIndex(tmp_path / name, spec).store.read(ALL) for name in ("new", "old")]
    np.testing.assert_allclose(stores[0], stores[1], rtol=1e-5)


def test_recall_of_bits_is_that_of_what_answers(problem: Problem) -> None:
    index = problem.fit("index", method={"type": "ekfac"}, store={"layout": "vectors"})
    during = LoadedIndex(index.folder, index.spec, index.context, holds_rows=False)
    assert isinstance(during._search, VectorIndex)
