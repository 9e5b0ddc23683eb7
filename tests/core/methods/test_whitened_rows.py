"""Rows of vectors in an index: sketched in the whitened basis, as bits by default, and older indexes as they were."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.arrays import read_arrays
from attribution_core.methods.artifact import FACTORS_FILE
from attribution_core.methods.context import WHITENED, FitContext
from attribution_core.search.faiss_index import VectorIndex
from tests.core.methods.problems import Problem, images, relative_error

ALL = np.arange(60)
WHITENED_METHODS = ("ekfac", "kfac", "diagonal", "gauss_newton")
FLOATS = {"layout": "vectors", "dtype": "float32"}


def errors(given: Problem, method: dict[str, Any], store: dict[str, Any]) -> tuple[float, float]:
    """Return how far scores of stored rows are from exact ones, and recall."""
    index = given.fit("index", method=method, store=store)
    query = index.query(given.queries(), None)
    exact = index.scores(query, ALL, rescore=True)
    assert index.recall is not None
    return relative_error(index.scores(query, ALL, rescore=False), exact), index.recall


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
            errors(given, {"type": kind, "damping": 0.01, "projection": {"dim": 128, "seed": seed}}, FLOATS)[0]
            for seed in range(5)
        ]
        found[whitens] = float(np.mean(over))
    assert found[True] < 0.75 * found[False]


@pytest.mark.parametrize("kind", WHITENED_METHODS)
def test_self_influence_comes_with_the_sketch(kind: str, problem: Problem) -> None:
    method = {"type": kind, "damping": 0.1}
    whitened = problem.fit("whitened", method=method, store=FLOATS)
    whole = problem.fit("whole", method=method, store={"layout": "factors"})
    assert relative_error(whitened.self_influence(), whole.self_influence()) < 1e-5


def test_any_damping_may_be_asked_of_whitened_rows(problem: Problem) -> None:
    """Rows are whitened at the fit's damping; the query's side takes that back."""
    index = problem.fit("index", method={"type": "ekfac", "damping": 0.1, "projection": {"dim": 4096}}, store=FLOATS)
    for damping in (0.01, 0.1, 1.0):
        query = index.query(problem.queries(), damping)
        exact = index.scores(query, ALL, rescore=True)
        assert relative_error(index.scores(query, ALL, rescore=False), exact) < 0.1


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
        assert (index.store.binary, index.store.dim) == (row_type == "binary", dim)
    for dtype, row_type in (("auto", "float32"), ("binary", "binary")):
        store, search = {"layout": "vectors", "dtype": dtype}, {"type": "ivf", "lists": 4}
        ivf = problem.fit("ivf", method={"type": "ekfac"}, store=store, search=search)
        assert (ivf.context.row_type, ivf.dim) == (row_type, 1024)
    assert problem.fit("factors", method={"type": "ekfac"}, store={}).context.row_type == "float32"


def test_held_bits_find_what_reading_them_finds(problem: Problem) -> None:
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
    assert torch.isfinite(torch.tensor(context.default_damping))
