"""Stored scores answer as an index of features does, for the queries they belong to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.data.batch import Batch
from attribution_core.errors import CorruptArtifactError, FingerprintMismatchError, InvalidInputError
from attribution_core.methods.dense import SCORES_FILE, DenseIndex, DenseScores, query_keys
from tests.core.methods.problems import SMALL, Problem

ALL = np.arange(60)


@pytest.fixture(scope="module")
def dense(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> DenseIndex:
    """The exact scores of a gradient index, stored."""
    index = problem.fit("dot", method={"type": "grad_dot", "projection": SMALL})
    query = index.query(problem.queries(), None)
    folder = tmp_path_factory.mktemp("dense")
    keys = query_keys(problem.queries())
    stored = DenseScores(index.scores(query, ALL, rescore=True), keys, query.outputs, "rows 0 to 3", {"percent": 100.0})
    summary = stored.write(folder, index.spec)
    assert (summary.num_examples, summary.dim, summary.recall) == (60, 4, None)
    return DenseIndex(folder, index.spec)


def test_answers_are_those_of_the_scores_origin(problem: Problem, dense: DenseIndex) -> None:
    index = problem.fit("dot", method={"type": "grad_dot", "projection": SMALL})
    batch = problem.queries()[torch.tensor([2, 0])]
    ours, theirs = dense.query(batch, None), index.query(batch, None)
    assert [out["prediction"] for out in ours.outputs] == [out["prediction"] for out in theirs.outputs]
    np.testing.assert_allclose(
        dense.scores(ours, ALL, rescore=True), index.scores(theirs, ALL, rescore=True), rtol=1e-5
    )
    groups = [ALL[::3], ALL[5:6], ALL[:0]]
    np.testing.assert_allclose(
        dense.group_effects(ours, groups, rescore=True), index.group_effects(theirs, groups, rescore=True), rtol=1e-4
    )
    for allowed in (None, ALL % 4 == 0):
        found = dense.attribute(ours, 5, allowed, rescore=True)
        for one, other in zip(found, index.attribute(theirs, 5, allowed, rescore=True), strict=True):
            assert one.positive.rows.tolist() == other.positive.rows.tolist()
            assert one.negative.rows.tolist() == other.negative.rows.tolist()
            assert not one.approximate


def test_other_queries_are_refused_with_those_that_are_known(problem: Problem, dense: DenseIndex) -> None:
    batch = problem.queries()
    for changed in (
        Batch(batch.rows, batch.inputs + 1e-6, batch.targets),
        Batch(batch.rows, batch.inputs, (batch.targets + 1) % 3),
    ):
        for ask in (lambda given: dense.query(given, None), dense.outputs):
            with pytest.raises(InvalidInputError, match=r"query 0 .* it answers rows 0 to 3") as caught:
                ask(changed)
            assert caught.value.pointer == "/queries"
    with pytest.raises(InvalidInputError, match="ask another index"):
        dense.self_influence()
    with pytest.raises(InvalidInputError, match="row 60 does not exist"):
        dense.scores(dense.query(batch, None), np.array([60]), rescore=False)


def test_padding_is_no_content() -> None:
    tokens = torch.tensor([[5, 6, 7, 0]])
    mask = torch.tensor([[True, True, True, False]])
    short = Batch(torch.tensor([3]), tokens[:, :3], None, mask[:, :3])
    assert query_keys(short) == query_keys(Batch(torch.tensor([-1]), tokens, None, mask))
    assert query_keys(short) != query_keys(Batch(torch.tensor([3]), tokens, None, torch.ones(1, 4, dtype=torch.bool)))


def test_damage_and_mismatch_are_noticed(problem: Problem, dense: DenseIndex, tmp_path: Path) -> None:
    with pytest.raises(FingerprintMismatchError):
        DenseIndex(dense.folder, problem.with_(measurement="loss"))
    for path in dense.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / SCORES_FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / SCORES_FILE).write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=SCORES_FILE):
        DenseIndex(tmp_path, dense.spec)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_not_stored(problem: Problem, tmp_path: Path, value: float) -> None:
    scores = np.zeros((2, 60))
    scores[1, 7] = value
    outputs: list[dict[str, Any]] = [{}, {}]
    with pytest.raises(InvalidInputError, match="query 1 has no finite scores"):
        DenseScores(scores, ["a", "b"], outputs, "two", {}).write(tmp_path, problem.spec)
