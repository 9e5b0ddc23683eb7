"""Every search against a sort of all scores, for both signs, filters, and any division into blocks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from attribution_core.errors import CorruptArtifactError
from attribution_core.features import rows as rows_module
from attribution_core.search import faiss_index
from attribution_core.search.exact import BlockSearch, exact_top
from attribution_core.search.faiss_index import RADII_FILE_NAME, VectorIndex
from attribution_core.search.merge import Ranked, merged
from attribution_core.spec import SearchSpec

N, DIM = 300, 8
FLAT = SearchSpec()
ALL_LISTS = SearchSpec(type="ivf", lists=12, probes=12)
FEW_LISTS = SearchSpec(type="ivf", lists=12, probes=2)
CODES = SearchSpec(type="ivfpq", lists=12, probes=2, subquantizers=3, bits=4)


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(N, DIM)).astype(np.float32)
    rows[50:60] = rows[40:50]  # ties
    return rows, rng.normal(size=(5, DIM)).astype(np.float32)


class Rows:
    """Rows in memory, handed out in blocks."""

    sizes: np.ndarray | None = None

    def __init__(self, rows: np.ndarray, size: int = N) -> None:
        self.rows, self.size, self.dim = rows, size, rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def weighted_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(self.rows), self.size):
            yield start, self.rows[start : start + self.size]

    def read_weighted(self, rows: np.ndarray) -> np.ndarray:
        return self.rows[rows]

    def signs(self) -> Iterator[tuple[int, np.ndarray]]:
        for start, rows in self.weighted_blocks():
            yield start, np.packbits(rows > 0, axis=1, bitorder="little")


def brute_force(queries: np.ndarray, rows: np.ndarray, k: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """Row numbers by score and then by number, one query at a time."""
    numbers = np.arange(len(rows)) if allowed is None else np.flatnonzero(allowed)
    scores = (queries.astype(np.float64) @ rows[numbers].T.astype(np.float64)).round(9)
    return np.stack([numbers[np.lexsort((numbers, -line))[:k]] for line in scores])


@pytest.mark.parametrize("size", [1, 37, N])
@pytest.mark.parametrize("sign", [1, -1])
def test_exact_search_whatever_the_blocks(size: int, sign: int) -> None:
    rows, queries = data()
    found = exact_top(sign * queries, Rows(rows, size).weighted_blocks(), 20)
    np.testing.assert_array_equal(found.rows, brute_force(sign * queries, rows, 20))


@pytest.mark.parametrize("spec", [FLAT, ALL_LISTS])
@pytest.mark.parametrize("size", [37, N])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [1, 20, N, 10**9])
def test_faiss_finds_the_top_of_both_signs(spec: SearchSpec, size: int, sign: int, k: int) -> None:
    rows, queries = data()
    index = VectorIndex.build(spec, Rows(rows, size))
    assert index.exhaustive
    found = index.search(sign * queries, k)
    expected = brute_force(sign * queries, rows, min(k, N))
    np.testing.assert_array_equal(found.rows, expected)
    for number, line in enumerate(expected):
        np.testing.assert_allclose(found.scores[number], sign * rows[line] @ queries[number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 20, 10**9])
def test_rows_that_are_read_for_every_search_give_the_same(k: int) -> None:
    rows, queries = data()
    searches = VectorIndex.build(FLAT, Rows(rows, 37)), BlockSearch(Rows(rows, 37))
    for mask in (None, np.arange(N) % 3 > 0, np.zeros(N, bool)):
        held, read = (search.search(queries, k, mask) for search in searches)
        np.testing.assert_array_equal(held.rows, read.rows)
        np.testing.assert_allclose(held.scores, read.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scanned", [0, 1000])
@pytest.mark.parametrize("spec", [FLAT, ALL_LISTS, FEW_LISTS, CODES])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_filters_are_filled_and_exact_where_rows_are_few(
    spec: SearchSpec, count: int, scanned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_index, "SCANNED_ROWS", scanned)
    rows, queries = data()
    allowed = np.zeros(N, bool)
    allowed[np.random.default_rng(1).choice(N, count, replace=False)] = True
    found = VectorIndex.build(spec, Rows(rows, 100)).search(queries, 10, allowed)
    assert found.rows.shape == (5, min(10, count))
    if spec not in (FEW_LISTS, CODES) or count < 40 or scanned:
        np.testing.assert_array_equal(found.rows, brute_force(queries, rows, 10, allowed))
    assert (found.rows >= 0).all()
    assert allowed[found.rows].all()


@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_searches_of_many_allowed_rows_are_filled_and_widened(
    kind: Literal["ivf", "ivfpq"], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not exact, as without a filter, but find more of the best: the fewer are allowed, the more clusters are visited."""
    monkeypatch.setattr(faiss_index, "SCANNED_ROWS", 100)
    rng = np.random.default_rng(6)
    rows, queries = (rng.normal(size=(count, DIM)).astype(np.float32) for count in (4000, 40))
    allowed = rng.random(4000) < share
    index = VectorIndex.build(SearchSpec(type=kind, lists=64, probes=8), Rows(rows, 1000))
    recalls = []
    for mask in (None, allowed):
        found = index.search(queries, 20, mask).rows
        assert (found >= 0).all()
        assert mask is None or mask[found].all()
        wanted = brute_force(queries, rows, 20, mask)
        recalls.append(np.mean([np.isin(a, b).mean() for a, b in zip(wanted, found, strict=True)]))
    assert 0.8 < recalls[0] < recalls[1] > 0.9


@pytest.mark.parametrize("spec", [FLAT, ALL_LISTS])
@pytest.mark.parametrize("k", [1, 5, 20, 60])
def test_equal_scores_are_ordered_by_row_even_where_they_are_cut_off(spec: SearchSpec, k: int) -> None:
    """Rows of signs have few different scores, and clusters are visited in another order than rows."""
    rows = np.random.default_rng(2).choice(np.array([-1, 1], np.float32), (N, DIM))
    queries = np.ones((2, DIM), np.float32)
    index = VectorIndex.build(spec, Rows(rows, 64))
    for sign in (1, -1):
        expected = brute_force(sign * queries, rows, k)
        np.testing.assert_array_equal(index.search(sign * queries, k).rows, expected)
        np.testing.assert_array_equal(exact_top(sign * queries, Rows(rows, 64).weighted_blocks(), k).rows, expected)


@pytest.mark.parametrize("spec", [FEW_LISTS, CODES])
def test_negatives_are_searched_near_the_negated_query(spec: SearchSpec) -> None:
    """The lists nearest to +q hold few of the most negative rows; those nearest to -q hold them."""
    rows, queries = data(3)
    index = VectorIndex.build(spec, Rows(rows))
    assert not index.exhaustive
    worst = brute_force(-queries, rows, 5)
    near_query = index.search(queries, 100).rows
    near_negated = index.search(-queries, 5).rows

    def share(found: np.ndarray) -> float:
        return float(np.mean([np.isin(a, b).mean() for a, b in zip(worst, found, strict=True)]))

    assert share(near_negated) > 0.5
    assert share(near_query) < share(near_negated)


@pytest.mark.parametrize("dim", [5, 8])
def test_what_codes_find_is_scored_by_the_rows(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bits for three numbers rank badly; among enough rows that they find, the true scores rank."""
    rows, queries = data()
    rows, queries = rows[:, :dim], queries[:, :dim]
    spec = CODES.model_copy(update={"probes": 12})
    index = VectorIndex.build(spec, Rows(rows))
    found = index.search(queries, 20)  # 400 candidates: all rows
    np.testing.assert_array_equal(found.rows, brute_force(queries, rows, 20))
    for number, line in enumerate(found.rows):
        np.testing.assert_allclose(found.scores[number], rows[line] @ queries[number], rtol=1e-5)
    monkeypatch.setattr(faiss_index, "_REFINED", 1)
    monkeypatch.setattr(faiss_index, "_MIN_REFINED", 1)
    rough = index.search(queries, 20)
    assert (rough.rows != found.rows).any()
    for number, line in enumerate(rough.rows):
        np.testing.assert_allclose(rough.scores[number], rows[line] @ queries[number], rtol=1e-5)


def test_long_rows_are_found_in_few_lists() -> None:
    """Lengths span three orders of magnitude; the best rows are long ones, in small clusters that are visited first."""
    rng = np.random.default_rng(5)
    rows = (rng.normal(size=(4000, DIM)) * np.exp(2 * rng.normal(size=(4000, 1)))).astype(np.float32)
    queries = rng.normal(size=(40, DIM)).astype(np.float32)
    index = VectorIndex.build(SearchSpec(type="ivf", lists=100, probes=10), Rows(rows))
    found = index.search(queries, 20).rows
    wanted = brute_force(queries, rows, 20)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(wanted, found, strict=True)]) > 0.95


@pytest.mark.parametrize("spec", [SearchSpec(type="ivf"), SearchSpec(type="ivfpq")])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_few_rows_can_be_indexed(spec: SearchSpec, count: int) -> None:
    rows, queries = data()
    index = VectorIndex.build(spec, Rows(rows[:count]))
    everything = np.ones(count, bool)
    np.testing.assert_array_equal(index.search(queries, 3, everything).rows, brute_force(queries, rows[:count], 3))


@pytest.mark.parametrize("spec", [FLAT, FEW_LISTS, CODES, SearchSpec(type="ivf", lists=2)])
def test_written_index_answers_the_same_and_has_the_same_bytes(tmp_path: Path, spec: SearchSpec) -> None:
    rows, queries = data()
    paths = [tmp_path / "one" / "index", tmp_path / "two" / "index"]
    for path, size in zip(paths, (37, 300), strict=True):
        path.parent.mkdir()
        VectorIndex.build(spec, Rows(rows, size)).write(path)
    written = [{file.name: file.read_bytes() for file in path.parent.iterdir()} for path in paths]
    assert written[0] == written[1]
    before = VectorIndex.build(spec, Rows(rows, 300)).search(queries, 10)
    after = VectorIndex.read(paths[0], Rows(rows)).search(queries, 10)
    np.testing.assert_array_equal(before.rows, after.rows)


def test_codes_of_many_lists_are_read_again(tmp_path: Path) -> None:
    """A table of lists × parts × codes would be larger than the file of so few rows; no inner product needs it."""
    rows = np.random.default_rng(4).normal(size=(N, 64)).astype(np.float32)
    index = VectorIndex.build(SearchSpec(type="ivfpq", lists=24, probes=6, bits=4), Rows(rows))
    index.write(tmp_path / "index")
    before, after = (found.search(rows[:5], 10) for found in (index, VectorIndex.read(tmp_path / "index", Rows(rows))))
    np.testing.assert_array_equal(before.rows, after.rows)
    np.testing.assert_array_equal(before.scores, after.scores)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    rows, _ = data()
    path = tmp_path / "search.faiss"
    VectorIndex.build(FEW_LISTS, Rows(rows, 300)).write(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"nonsense" * 10, whole[:40] + b"\xff" * 8 + whole[48:]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifactError):
            VectorIndex.read(path, Rows(rows))
    path.write_bytes(whole)
    (tmp_path / RADII_FILE_NAME).unlink()
    with pytest.raises(CorruptArtifactError, match=RADII_FILE_NAME):
        VectorIndex.read(path, Rows(rows))


def test_merging_is_independent_of_order() -> None:
    first = Ranked(np.array([[4, 2]]), np.array([[1.0, 0.5]], np.float32))
    second = Ranked(np.array([[3, 9]]), np.array([[1.0, 0.7]], np.float32))
    for a, b in ((first, second), (second, first)):
        found = merged(a, b, 3)
        assert found.rows.tolist() == [[3, 4, 9]]
    assert merged(Ranked.empty(1), first, 5).rows.tolist() == [[4, 2]]


def bits(count: int, dim: int, used: int, decades: float) -> Rows:
    """Rows of signs with sizes over some decades; columns that are not used are positive in all of them, and some rows are zero."""
    rng = np.random.default_rng(dim)
    signs = np.ones((count, dim), np.float32)
    signs[:, :used] = rng.choice([-1.0, 1.0], (count, used))
    sizes = (10 ** rng.uniform(-decades, 0, count)).astype(np.float32) * 1e-3
    sizes[::97] = 0
    held = Rows(signs * sizes[:, None], 500)
    held.sizes = sizes
    return held


@pytest.mark.parametrize(("dim", "used", "decades"), [(64, 64, 1), (100, 100, 1), (4096, 4096, 6), (4096, 60, 1)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e20])
def test_bits_are_searched_as_they_are_stored(
    dim: int, used: int, decades: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both signs and with filters, among ten times as many rows as are scored again."""
    monkeypatch.setattr(faiss_index, "_MIN_REFINED", 0)
    held = bits(2000, dim, used, decades)
    index = VectorIndex.build(FLAT, held)
    assert not index.exhaustive
    queries = np.zeros((5, dim), np.float32)
    queries[:, :used] = scale * np.random.default_rng(1).normal(size=(5, used))
    allowed = np.arange(2000) % 3 == 0
    exact = queries.astype(np.float64) @ held.rows.T.astype(np.float64)
    for sign in (1, -1):
        for mask in (None, allowed):
            found = index.search(sign * queries, 100, mask)
            scores = sign * exact if mask is None else np.where(mask, sign * exact, -np.inf)
            wanted = np.argsort(-scores, axis=1)[:, :20]
            assert np.mean([np.isin(*pair).mean() for pair in zip(wanted, found.rows, strict=True)]) > 0.97
            np.testing.assert_allclose(found.scores, np.take_along_axis(scores, found.rows, 1), rtol=1e-3, atol=1e-30)


def test_bits_of_nothing_are_searched() -> None:
    held = Rows(np.zeros((9, 16), np.float32))
    held.sizes = np.zeros(9, np.float32)
    found = VectorIndex.build(FLAT, held).search(np.zeros((2, 16), np.float32), 3)
    np.testing.assert_array_equal(found.scores, 0)


def test_rows_that_are_scored_again_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held = bits(600, 64, 64, 1)
    queries = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    expected = VectorIndex.build(FLAT, held).search(queries, 50)
    monkeypatch.setattr(rows_module, "_NUMBERS_AT_ONCE", 64 * 7)
    found = VectorIndex.build(FLAT, held).search(queries, 50)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_bits_that_were_written_are_found_again(tmp_path: Path) -> None:
    held = bits(600, 100, 100, 1)
    index = VectorIndex.build(FLAT, held)
    index.write(tmp_path / "index")
    queries = np.random.default_rng(1).normal(size=(3, 100)).astype(np.float32)
    np.testing.assert_array_equal(
        VectorIndex.read(tmp_path / "index", held).search(queries, 5).rows, index.search(queries, 5).rows
    )


def test_bits_are_searched_by_a_faiss_whose_codes_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    held = bits(600, 100, 100, 1)
    queries = np.random.default_rng(1).normal(size=(3, 100)).astype(np.float32)
    expected = VectorIndex.build(FLAT, held).search(queries, 5)
    monkeypatch.setattr(faiss_index, "_lays_out_codes", lambda _: False)
    np.testing.assert_array_equal(VectorIndex.build(FLAT, held).search(queries, 5).rows, expected.rows)
