"""What a fit of `gauss_newton` stores of its pseudo-gradients, and that answers do not depend on how they are solved or found again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.arrays import read_arrays
from attribution_core.curvature.rows import PseudoRows
from attribution_core.methods.artifact import FACTORS_FILE
from attribution_core.methods.fitted import DEFAULT_DAMPING, WHITENED
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.pseudo_gradients import PseudoGradients
from tests.core.methods.problems import Problem, classification, images, relative_error, sure

EXACTLY = {
    "type": "gauss_newton",
    "residual_power": 1,
    "damping": 0.1,
    "shrinkage": 0.3,
    "negligible": 1.0,
    "iterations": 500,
    "tolerance": 1e-7,
}
MOST_ROWS = "attribution_core.curvature.row_factor.MAX_ROWS"


@pytest.fixture(scope="module", params=["perceptron", "convolutions"])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    folder = tmp_path_factory.mktemp(request.param)
    return classification(folder, 2) if request.param == "perceptron" else images(folder)


def scores(index: LoadedIndex, problem: Problem, damping: float | None = None) -> np.ndarray:
    query = index.query(problem.queries(), damping)
    return index.scores(query, np.arange(index.num_examples), rescore=True)


def slope(found: np.ndarray, whole: np.ndarray) -> float:
    return float((found * whole).sum() / (whole * whole).sum())


def stored(index: LoadedIndex) -> dict[str, Any]:
    return read_arrays(index.folder / FACTORS_FILE)


def test_a_factorisation_and_iterations_give_the_same_scores(given: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = given.fit("solved", method=EXACTLY)
    assert "0.rows.lower" in stored(solved)
    monkeypatch.setattr(MOST_ROWS, 0)
    iterated = given.fit("iterated", method=EXACTLY)
    assert "0.rows.lower" not in stored(iterated)
    assert np.array_equal(stored(iterated)["0.rows.owners"], stored(solved)["0.rows.owners"])
    assert relative_error(scores(solved, given), scores(iterated, given)) < 1e-4
    assert relative_error(scores(solved, given, 0.5), scores(iterated, given, 0.5)) < 1e-5


def test_another_damping_is_that_of_a_fit_with_it(given: Problem) -> None:
    found = scores(given.fit("one", method=EXACTLY), given, 0.4)
    expected = scores(given.fit("other", method={**EXACTLY, "damping": 0.4}), given)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(scores(given.fit("one", method=EXACTLY), given), expected) > 0.01


@pytest.mark.parametrize("layout", ["vectors", "factors"])
def test_scores_do_not_depend_on_shards_batches_or_the_process(given: Problem, layout: str) -> None:
    method = {"type": "gauss_newton", "negligible": 0.5}
    reference = given.fit("reference", method=method, store={"layout": layout})
    expected = scores(reference, given)
    for shard_size, batch_size in ((60, 60), (7, 3), (1, 1)):
        index = given.fit(
            "divided", method=method, store={"layout": layout}, shard_size=shard_size, batch_size=batch_size
        )
        assert relative_error(scores(index, given), expected) < 2e-5
        again = LoadedIndex(index.folder, index.spec.model_copy(update={"batch_size": 5}))
        assert relative_error(scores(again, given), scores(index, given)) < 2e-5


def test_an_index_that_does_not_say_its_damping_has_that_of_its_factorisation(given: Problem) -> None:
    """As those of before; at another, each query would be solved by steps."""
    index = given.fit("before", method={"type": "gauss_newton"})
    before = {
        name: value for name, value in stored(index).items() if DEFAULT_DAMPING not in name and WHITENED not in name
    }
    if "0.rows.scale" not in before:
        assert index.context.defaults.damping(before) == pytest.approx(index.default_damping)
        return
    before["0.rows.scale"] = np.array([before["0.rows.scale"][0], 1.2345])
    assert index.context.defaults.damping(before) == 1.2345


def test_only_examples_with_a_row_are_run_again(given: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    index = given.fit("less", method={"type": "gauss_newton", "negligible": 1.0})
    arrays, ran = stored(index), list[int]()
    used = arrays["0.rows.examples"][np.unique(arrays["0.rows.owners"])]
    assert 0 < len(used) < index.num_examples == len(arrays["0.rows.examples"])
    draws = index.context.pseudo_gradients.draws

    def noted(number: int, fisher: Any, rows: np.ndarray) -> Any:
        ran.extend(rows if number == 0 else [])
        return draws(number, fisher, rows)

    monkeypatch.setattr(index.context.pseudo_gradients, "draws", noted)
    index.query(given.queries(), None)
    assert ran == used.tolist()


def test_examples_whose_outputs_do_not_matter_have_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not even drawn, unless every row is to be kept; the rows of the others are those that they have anyway."""
    given, method = sure(tmp_path), {"type": "gauss_newton", "residual_power": 1, "damping": 0.1}
    index = given.fit("some", method=method)
    arrays, places = stored(index), index.context.pseudo_gradients.that_matter(0, np.arange(60))
    owners = set(arrays["0.rows.owners"].tolist())
    assert len(arrays["0.rows.examples"]) == 60 > len(places)
    assert owners <= set(places.tolist())
    monkeypatch.setattr(PseudoGradients, "that_matter", lambda *_: pytest.fail("asked"))
    given.fit("every", method=method | {"negligible": 0})
    monkeypatch.setattr(PseudoGradients, "that_matter", lambda self, number, rows: np.arange(len(rows)))
    everywhere = given.fit("all", method=method)
    assert owners == set(stored(everywhere)["0.rows.owners"].tolist()) & set(places.tolist())
    assert relative_error(scores(index, given), scores(everywhere, given)) < 0.1
    monkeypatch.undo()
    again = LoadedIndex(index.folder, index.spec.model_copy(update={"batch_size": 5}))
    assert relative_error(scores(again, given), scores(index, given)) < 2e-5


def test_rows_that_are_more_than_parameters_are_not_listed(given: Problem) -> None:
    index = given.fit("many", method={**EXACTLY, "negligible": 0})
    rows = index.members[0].curvature.rows()  # type: ignore[attr-defined]
    assert (len(rows) > sum(block.numel for block in rows.blocks)) == (
        not any("rows" in name for name in stored(index))
    )


def test_what_is_left_out_changes_scores_by_little(given: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """The less the more is kept; and less than without its diagonal, where too little would bend and scores would be too large."""

    def kept(name: str, share: float, shrinkage: float = 0.8) -> np.ndarray:
        return scores(given.fit(name, method={**EXACTLY, "shrinkage": shrinkage, "negligible": share}), given)

    whole = kept("whole", 0)
    errors = [relative_error(kept("less", share), whole) for share in (0.01, 0.3, 1.0)]
    assert 0 < errors[0] < min(errors[1:])
    assert max(errors) < 0.1
    alone, most = kept("alone", 0, 0.0), kept("most", 1.0, 0.0)
    monkeypatch.setattr(PseudoRows, "left_out", lambda self, diagonals: [torch.zeros_like(part) for part in diagonals])
    lost = kept("lost", 1.0, 0.0)
    assert relative_error(most, alone) < relative_error(lost, alone)
    assert slope(lost, alone) > 1.1


def test_without_a_group_what_it_left_out_is_gone_too(given: Problem) -> None:
    """Of all other examples' curvature nothing is left out, whether rows or diagonals tell it."""
    group, query = np.arange(0, 60, 3), given.queries()
    effects = []
    for share in (0, 0.3):
        index = given.fit("group", method={**EXACTLY, "negligible": share})
        effects.append(index.newton_effects(index.query(query, None), [group]))
    assert relative_error(effects[1], effects[0]) < 0.15


@pytest.mark.parametrize(
    ("copies", "fisher", "shrinkage", "times"),
    [(None, "auto", 0.8, 1), (2, "auto", 0.5, 2), (2, "exact", 0.5, 2), (2, "sampled", 0.8, 1)],
)
def test_exact_matrices_of_copies_are_shrunk_less_and_damped_more(
    copies: int | None, fisher: str, shrinkage: float, times: float, given: Problem
) -> None:
    """A part of what shrinkage guards against averages out over them."""
    method = {"type": "gauss_newton", "fisher": fisher, "perturbation": copies and {"copies": copies}}
    index = given.fit("default", method=method)
    named = given.fit("named", method={**method, "shrinkage": shrinkage})
    assert index.default_damping == pytest.approx(times * named.default_damping, rel=0.01)
    damping = index.default_damping
    assert relative_error(scores(index, given), scores(named, given, damping)) < 0.02  # that of iterations
    assert (index.spec.fingerprint() == named.spec.fingerprint()) is (copies is None)
    other = given.fit("other", method={**method, "shrinkage": 0.3})
    assert other.spec.fingerprint() not in (index.spec.fingerprint(), named.spec.fingerprint())
    assert relative_error(scores(other, given, damping), scores(index, given)) > 0.03
