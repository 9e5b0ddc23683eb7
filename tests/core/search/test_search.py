"""Every search against a sort of all scores, for both signs, filters, and any division into blocks."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from attribution_core.errors import CorruptArtifactError
from attribution_core.search.exact import exact_top
from attribution_core.search.faiss_index import Blocks, VectorIndex
from attribution_core.search.merge import Ranked, merged
from attribution_core.spec import SearchSpec

N, DIM = 300, 8
FLAT = SearchSpec()
ALL_LISTS = SearchSpec(type="ivf", lists=12, probes=12)
FEW_LISTS = SearchSpec(type="ivf", lists=12, probes=2)


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(N, DIM)).astype(np.float32)
    rows[50:60] = rows[40:50]  # ties
    return rows, rng.normal(size=(5, DIM)).astype(np.float32)


def blocks_of(rows: np.ndarray, size: int) -> Blocks:
    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(rows), size):
            yield start, rows[start : start + size]

    return blocks


def brute_force(queries: np.ndarray, rows: np.ndarray, k: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """Row numbers by score and then by number, one query at a time."""
    numbers = np.arange(len(rows)) if allowed is None else np.flatnonzero(allowed)
    scores = (queries.astype(np.float64) @ rows[numbers].T.astype(np.float64)).round(9)
    return np.stack([numbers[np.lexsort((numbers, -line))[:k]] for line in scores])


@pytest.mark.parametrize("size", [1, 37, N])
@pytest.mark.parametrize("sign", [1, -1])
def test_exact_search_whatever_the_blocks(size: int, sign: int) -> None:
    rows, queries = data()
    found = exact_top(sign * queries, blocks_of(rows, size)(), 20)
    np.testing.assert_array_equal(found.rows, brute_force(sign * queries, rows, 20))


@pytest.mark.parametrize("spec", [FLAT, ALL_LISTS])
@pytest.mark.parametrize("size", [37, N])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [1, 20, N, 10**9])
def test_faiss_finds_the_top_of_both_signs(spec: SearchSpec, size: int, sign: int, k: int) -> None:
    rows, queries = data()
    index = VectorIndex.build(spec, blocks_of(rows, size), N, DIM)
    assert index.exhaustive
    found = index.search(sign * queries, k)
    expected = brute_force(sign * queries, rows, min(k, N))
    np.testing.assert_array_equal(found.rows, expected)
    for number, line in enumerate(expected):
        np.testing.assert_allclose(found.scores[number], sign * rows[line] @ queries[number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [FLAT, ALL_LISTS, FEW_LISTS])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_filters_are_exact_and_filled(spec: SearchSpec, count: int) -> None:
    rows, queries = data()
    allowed = np.zeros(N, bool)
    allowed[np.random.default_rng(1).choice(N, count, replace=False)] = True
    found = VectorIndex.build(spec, blocks_of(rows, 100), N, DIM).search(queries, 10, allowed)
    assert found.rows.shape == (5, min(10, count))
    if spec is not FEW_LISTS or count < 40:
        np.testing.assert_array_equal(found.rows, brute_force(queries, rows, 10, allowed))
    assert allowed[found.rows].all()


@pytest.mark.parametrize("spec", [FLAT, ALL_LISTS])
@pytest.mark.parametrize("k", [1, 5, 20, 60])
def test_equal_scores_are_ordered_by_row_even_where_they_are_cut_off(spec: SearchSpec, k: int) -> None:
    """Rows of signs have few different scores, and clusters are visited in another order than rows."""
    rows = np.random.default_rng(2).choice(np.array([-1, 1], np.float32), (N, DIM))
    queries = np.ones((2, DIM), np.float32)
    index = VectorIndex.build(spec, blocks_of(rows, 64), N, DIM)
    for sign in (1, -1):
        expected = brute_force(sign * queries, rows, k)
        np.testing.assert_array_equal(index.search(sign * queries, k).rows, expected)
        np.testing.assert_array_equal(exact_top(sign * queries, blocks_of(rows, 64)(), k).rows, expected)


def test_negatives_are_searched_near_the_negated_query() -> None:
    """The lists nearest to +q hold few of the most negative rows; those nearest to -q hold them."""
    rows, queries = data(3)
    index = VectorIndex.build(FEW_LISTS, blocks_of(rows, 100), N, DIM)
    assert not index.exhaustive
    worst = brute_force(-queries, rows, 5)
    near_query = index.search(queries, 100).rows
    near_negated = index.search(-queries, 5).rows

    def share(found: np.ndarray) -> float:
        return float(np.mean([np.isin(a, b).mean() for a, b in zip(worst, found, strict=True)]))

    assert share(near_negated) > 0.5
    assert share(near_query) < share(near_negated)


@pytest.mark.parametrize("spec", [FLAT, FEW_LISTS, SearchSpec(type="ivf", lists=2)])
def test_written_index_answers_the_same_and_has_the_same_bytes(tmp_path: Path, spec: SearchSpec) -> None:
    rows, queries = data()
    paths = [tmp_path / "one", tmp_path / "two"]
    for path, size in zip(paths, (37, 300), strict=True):
        VectorIndex.build(spec, blocks_of(rows, size), N, DIM).write(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    before = VectorIndex.build(spec, blocks_of(rows, 300), N, DIM).search(queries, 10)
    after = VectorIndex.read(paths[0]).search(queries, 10)
    np.testing.assert_array_equal(before.rows, after.rows)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    rows, _ = data()
    path = tmp_path / "search.faiss"
    VectorIndex.build(FEW_LISTS, blocks_of(rows, 300), N, DIM).write(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"nonsense" * 10, whole[:40] + b"\xff" * 8 + whole[48:]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifactError):
            VectorIndex.read(path)


def test_merging_is_independent_of_order() -> None:
    first = Ranked(np.array([[4, 2]]), np.array([[1.0, 0.5]], np.float32))
    second = Ranked(np.array([[3, 9]]), np.array([[1.0, 0.7]], np.float32))
    for a, b in ((first, second), (second, first)):
        found = merged(a, b, 3)
        assert found.rows.tolist() == [[3, 4, 9]]
    assert merged(Ranked.empty(1), first, 5).rows.tolist() == [[4, 2]]
