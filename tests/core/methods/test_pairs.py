"""Many queries are scored in lots that bound memory, and no score tells so."""

import numpy as np
import pytest

from attribution_core.data.batch import Batch
from attribution_core.errors import Cancelled
from attribution_core.methods import pairs
from attribution_core.methods.answers import Query
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.pairs import all_scores
from tests.core.methods.problems import SMALL, Problem, relative_error

METHODS = (
    {"type": "ekfac", "projection": SMALL},
    {"type": "gauss_newton", "projection": SMALL},
    {"type": "trak", "projection": SMALL},
    {"type": "representation"},
)


@pytest.fixture
def lots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is queried together."""
    found: list[int] = []
    query = LoadedIndex.query

    def counted(index: LoadedIndex, batch: Batch, damping: float | None) -> Query:
        found.append(len(batch))
        return query(index, batch, damping)

    monkeypatch.setattr(LoadedIndex, "query", counted)
    return found


@pytest.mark.parametrize("layout", ["auto", "vectors"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["type"])
def test_lots_change_no_score(
    ensemble: Problem, method: dict[str, object], layout: str, lots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ensemble.fit("index", method=method, store={"layout": layout})
    queries, rows = ensemble.queries(), np.array([7, 0, 11])
    lots.clear()
    expected = index.scores(index.query(queries, 0.3), rows, rescore=True)
    for name in ("_MOST", "_MOST_OF_PASS"):
        monkeypatch.setattr(pairs, name, 2)
    assert relative_error(all_scores(index, queries, 0.3, rows), expected) < 1e-5
    assert lots == [len(queries), *[2] * (len(queries) // 2), *[1] * (len(queries) % 2)]


def test_lots_are_as_large_as_their_solved_gradients_let(
    ensemble: Problem, lots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"type": "ekfac", "projection": SMALL}
    kept = ensemble.fit("kept", method=method, store={"layout": "factors"})
    passed = ensemble.fit("passed", method=method, store={"layout": "vectors"})
    parameters = kept.members[0].checkpoint.capture.num_parameters
    monkeypatch.setattr(pairs, "_BYTES", 2 * 4 * 3 * parameters)  # two queries under three checkpoints
    queries = ensemble.queries()
    lots.clear()
    assert all_scores(kept, queries).shape == (len(queries), kept.num_examples)
    assert max(lots) == 2
    lots.clear()
    all_scores(passed, queries)
    assert lots == [len(queries)]  # every lot would take a pass over the training set
    monkeypatch.setattr(pairs, "_BYTES", 1)
    lots.clear()
    all_scores(kept, queries)
    assert lots == [1] * len(queries)


def test_it_stops_between_lots(problem: Problem) -> None:
    class Stopped:
        def advance(self, units: int) -> None:
            raise Cancelled("stop")

    index = problem.fit("index", method={"type": "ekfac", "projection": SMALL})
    with pytest.raises(Cancelled):
        all_scores(index, problem.queries(), progress=Stopped())


@pytest.mark.parametrize(("count", "most"), [(1, 1), (1, 9), (9, 4), (200, 196), (200, 64), (200, 200), (7, 3)])
def test_lots_are_few_and_of_one_size(count: int, most: int) -> None:
    lots = pairs._lots(count, most)
    sizes = [stop - start for start, stop in lots]
    assert len(lots) == -(-count // most)
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert [row for start, stop in lots for row in range(start, stop)] == list(range(count))
