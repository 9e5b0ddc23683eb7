"""What a fitted index answers: top examples of both signs, groups, filters; and that damage and mismatch are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.errors import CorruptArtifactError, FingerprintMismatchError, InvalidInputError
from attribution_core.methods import loaded
from attribution_core.methods.context import FitContext
from attribution_core.methods.loaded import LoadedIndex
from tests.core.methods.problems import SMALL, Problem
from tests.core.methods.test_fit import METHODS

ALL = np.arange(60)
EVERY_LIST = {"type": "ivf", "lists": 6, "probes": 6}


def brute_force(scores: np.ndarray, k: int, sign: int, allowed: np.ndarray | None) -> list[int]:
    rows = [row for row in ALL if sign * scores[row] > 0 and (allowed is None or allowed[row])]
    return sorted(rows, key=lambda row: (-sign * scores[row], row))[:k]


@pytest.mark.parametrize("shard_size", [60, 16, 7])
@pytest.mark.parametrize("search", [{"type": "flat"}, EVERY_LIST], ids=["flat", "ivf"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rescore", [True, False])
def test_top_of_both_signs(
    problem: Problem, method: str, search: dict[str, Any], shard_size: int, rescore: bool
) -> None:
    index = problem.fit("top", method=METHODS[method], search=search, shard_size=shard_size)
    query = index.query(problem.queries(), None)
    scores = index.scores(query, ALL, rescore=rescore)
    for k, allowed in ((5, None), (5, ALL % 7 == 0), (1000, None), (3, np.zeros(60, bool))):
        for number, found in enumerate(index.attribute(query, k, allowed, rescore=rescore)):
            for sign, answer in ((1, found.positive), (-1, found.negative)):
                assert answer.rows.tolist() == brute_force(scores[number], k, sign, allowed)
                np.testing.assert_allclose(
                    answer.scores, scores[number][answer.rows], rtol=1e-4, atol=1e-5 * np.abs(scores).max()
                )
            assert found.approximate == (index.rescores and not rescore)


@pytest.mark.parametrize("search", [{"type": "ivf"}, {"type": "ivfpq", "subquantizers": 8, "bits": 4}])
def test_negatives_come_from_lists_near_the_negated_query(problem: Problem, search: dict[str, Any]) -> None:
    """With few lists visited, the most negative examples are in others than the most positive ones."""
    index = problem.fit("negated", method=METHODS["trak"], search={**search, "lists": 12, "probes": 2})
    query = index.query(problem.queries(12), None)
    scores = index.scores(query, ALL, rescore=False)
    shares: dict[int, list[float]] = {1: [], -1: []}
    for number, answer in enumerate(index.attribute(query, 3, None, rescore=False)):
        assert answer.approximate
        for sign, found in ((1, answer.positive), (-1, answer.negative)):
            shares[sign].append(float(np.isin(brute_force(scores[number], 3, sign, None), found.rows).mean()))
            np.testing.assert_allclose(found.scores, scores[number][found.rows], rtol=1e-4)
    assert np.mean(shares[1]) > 0.7
    assert np.mean(shares[-1]) > 0.7


def test_candidates_of_one_sign_serve_the_other(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example that a coarse projection puts on the wrong side is still found where its exact score puts it."""
    monkeypatch.setattr(loaded, "MIN_CANDIDATES", 30)
    coarse = {"type": "sjlt", "dim": 8, "seed": 0}
    index = problem.fit("coarse", method={"type": "grad_dot", "projection": coarse})
    query = index.query(problem.queries(), None)
    exact, rough = (index.scores(query, ALL, rescore=rescore) for rescore in (True, False))
    assert (np.sign(exact) != np.sign(rough)).any()
    for number, found in enumerate(index.attribute(query, 3, None, rescore=True)):
        assert not found.approximate  # the 30 best of both signs are all 60
        assert found.positive.rows.tolist() == brute_force(exact[number], 3, 1, None)
        assert found.negative.rows.tolist() == brute_force(exact[number], 3, -1, None)


def test_what_was_not_looked_at_is_admitted(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "MIN_CANDIDATES", 4)
    monkeypatch.setattr(loaded, "OVERSAMPLING", 1)
    coarse = {"type": "sjlt", "dim": 8, "seed": 0}
    index = problem.fit("coarse", method={"type": "grad_dot", "projection": coarse})
    assert index.recall is not None
    assert 0.1 < index.recall < 0.9
    query = index.query(problem.queries(), None)
    assert all(found.approximate for found in index.attribute(query, 2, None, rescore=True))
    few = ALL < 6
    assert not any(found.approximate for found in index.attribute(query, 2, few, rescore=True))


def test_an_answer_does_not_depend_on_the_queries_beside_it(ensemble: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "MIN_CANDIDATES", 4)
    index = ensemble.fit("beside", method=METHODS["ekfac"])
    batch = ensemble.queries(4)
    together = index.attribute(index.query(batch, None), 3, None, rescore=True)
    for number, found in enumerate(together):
        alone = index.attribute(index.query(batch[number : number + 1], None), 3, None, rescore=True)[0]
        assert alone.positive.rows.tolist() == found.positive.rows.tolist()
        np.testing.assert_allclose(
            alone.negative.scores, found.negative.scores, rtol=1e-4, atol=1e-5 * np.abs(found.negative.scores).max()
        )
        assert alone.output["prediction"] == found.output["prediction"]
        assert alone.output["value"] == pytest.approx(found.output["value"], rel=1e-5)


@pytest.mark.parametrize("rescore", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_group_effects_are_sums_of_scores(ensemble: Problem, method: str, rescore: bool) -> None:
    index = ensemble.fit("groups", method=METHODS[method])
    query = index.query(ensemble.queries(), None)
    scores = index.scores(query, ALL, rescore=rescore).astype(np.float64)
    groups = [ALL, ALL[::3], np.array([5]), np.empty(0, np.int64)]
    found = index.group_effects(query, groups, rescore=rescore)
    expected = np.stack([scores[:, rows].sum(1) for rows in groups], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(scores).max())


def test_output_is_the_measurement_averaged_over_checkpoints(ensemble: Problem) -> None:
    index = ensemble.fit("outputs", method=METHODS["grad_dot"], measurement="log_likelihood")
    batch = ensemble.queries()
    values = torch.stack(
        [
            module(batch.inputs.double()).log_softmax(1).gather(1, batch.targets.unsqueeze(1))[:, 0]
            for module in ensemble.modules()
        ]
    ).mean(0)
    for outputs in (index.outputs(batch), index.query(batch, None).outputs):
        np.testing.assert_allclose([entry["value"] for entry in outputs], values.detach(), rtol=1e-5)


def test_rows_that_do_not_exist_are_refused(problem: Problem) -> None:
    index = problem.fit("rows")
    query = index.query(problem.queries(), None)
    for rescore in (True, False):
        for rows in (np.array([0, 60]), np.array([-1])):
            with pytest.raises(InvalidInputError, match="does not exist"):
                index.scores(query, rows, rescore=rescore)
            with pytest.raises(InvalidInputError, match="does not exist"):
                index.group_effects(query, [rows], rescore=rescore)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_do_not_fit_the_model_are_refused(problem: Problem, method: str) -> None:
    index = problem.fit("inputs", method=METHODS[method])
    good = problem.queries()
    wrong_width = good.__class__(good.rows, good.inputs[:, :4], good.targets)
    with pytest.raises(InvalidInputError, match="cannot be run"):
        index.query(wrong_width, None)
    with pytest.raises(InvalidInputError, match="cannot be run"):
        index.outputs(wrong_width)
    with pytest.raises(InvalidInputError, match="classes"):
        index.query(good.__class__(good.rows, good.inputs, good.targets + 7), None)


@pytest.mark.parametrize("method", METHODS)
def test_overflow_is_refused_and_never_answered_with_nan(problem: Problem, method: str) -> None:
    index = problem.fit("overflow", method=METHODS[method])
    batch = problem.queries()
    batch.inputs[2] = float("inf")
    if method == "representation":  # tanh of infinity is 1; only 0 · infinity is not a number
        batch.inputs[2, 0] = float("nan")
    with pytest.raises(InvalidInputError, match="query 2"):
        index.query(batch, None)


def test_every_damaged_byte_is_noticed(problem: Problem) -> None:
    index = problem.fit("damaged", method=METHODS["ekfac"], search=EVERY_LIST)
    paths = [path for path in index.folder.rglob("*") if path.is_file()]
    assert len(paths) == 8
    for path in paths:
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CorruptArtifactError):
                LoadedIndex(index.folder, index.spec)
        path.unlink()
        with pytest.raises(CorruptArtifactError):
            LoadedIndex(index.folder, index.spec)
        path.write_bytes(whole)
    assert LoadedIndex(index.folder, index.spec).recall == index.recall


def test_a_forged_description_is_refused(problem: Problem) -> None:
    index = problem.fit("forged")
    path = index.folder / "index.json"
    described = json.loads(path.read_text())
    described["content"]["recall"] = 0.5
    path.write_text(json.dumps(described))
    with pytest.raises(CorruptArtifactError, match=r"index\.json"):
        LoadedIndex(index.folder, index.spec)


@pytest.mark.parametrize(
    "changes",
    [
        {"measurement": "logit"},
        {"layers": ["layers.0"]},
        {"method": {"type": "grad_dot", "projection": {**SMALL, "seed": 4}}},
        {"method": {"type": "grad_dot", "projection": {**SMALL, "dim": 128}}},
        {"method": {"type": "grad_cos", "projection": SMALL}},
        {"store": {"dtype": "float16"}},
        {"store": {"dtype": "int8"}},
        {"search": {"type": "ivf"}},
        {"search": {"type": "ivfpq"}},
    ],
)
def test_results_of_something_else_are_refused(problem: Problem, changes: dict[str, Any]) -> None:
    index = problem.fit("mismatch")
    with pytest.raises(FingerprintMismatchError):
        LoadedIndex(index.folder, problem.with_(**changes))


def test_other_data_or_weights_are_refused(problem: Problem, tmp_path: Path) -> None:
    index = problem.fit("swapped")
    dataset = problem.spec.dataset
    for change in ({"sha256": "0" * 64}, {"num_examples": 59}):
        with pytest.raises((FingerprintMismatchError, CorruptArtifactError)):
            LoadedIndex(index.folder, problem.with_(dataset=dataset.model_copy(update=change)))
    reshaped = dataset.model_copy(update={"spec": dataset.spec.model_copy(update={"shape": [5, 1]})})
    with pytest.raises(FingerprintMismatchError):
        LoadedIndex(index.folder, problem.with_(dataset=reshaped))
    reference = problem.spec.checkpoints[0]
    other = tmp_path / "other.safetensors"
    other.write_bytes(reference.path.read_bytes()[:-4] + b"\0\0\0\0")
    swapped = problem.with_(checkpoints=[reference.model_copy(update={"path": other})])
    with pytest.raises(FingerprintMismatchError, match="ckpt_0"):
        LoadedIndex(index.folder, swapped)
    with pytest.raises(CorruptArtifactError, match="ckpt_0"):
        gone = reference.model_copy(update={"path": tmp_path / "gone"})
        LoadedIndex(index.folder, problem.with_(checkpoints=[gone]))


def test_a_measurement_the_task_has_not_is_refused(problem: Problem) -> None:
    with pytest.raises(InvalidInputError) as caught:
        FitContext(problem.with_(measurement="prediction"))
    assert caught.value.pointer == "/measurement"


@pytest.mark.parametrize("layout", ["vectors", "factors"])
@pytest.mark.parametrize("method", ["grad_dot", "ekfac"])
def test_queries_without_finite_gradient_are_refused(problem: Problem, method: str, layout: str) -> None:
    index = problem.fit("finite", method=METHODS[method], store={"layout": layout})
    queries = problem.queries()
    queries.inputs[2] = torch.inf
    with pytest.raises(InvalidInputError, match="no finite gradient for query 2"):
        index.query(queries, None)
