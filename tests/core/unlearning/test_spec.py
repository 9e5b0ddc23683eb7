"""What cannot be unlearned is refused before any work, with a pointer to the field."""

from typing import Any

import pytest

from attribution_core.errors import InvalidInputError
from attribution_core.training.spec import TrainSpec
from attribution_core.unlearning.pipeline import UnlearnPipeline
from attribution_core.unlearning.spec import UnlearnSpec
from tests.core.unlearning.problems import N, Problem

NEWTON = {"type": "newton"}


def refused(spec: UnlearnSpec) -> str | None:
    with pytest.raises(InvalidInputError) as error:
        UnlearnPipeline(spec, spec.index)
    return error.value.pointer


@pytest.mark.parametrize("forget", [[], list(range(N)), [N]])
def test_forget_sets_that_leave_or_name_nothing(perceptrons: Problem, forget: list[int]) -> None:
    assert refused(perceptrons.spec(NEWTON, forget=forget)) == "/forget"


def test_rows_named_twice_are_forgotten_once(perceptrons: Problem) -> None:
    twice, once = (perceptrons.spec(NEWTON, forget=rows) for rows in ([4, 2, 4], [2, 4]))
    assert twice.forgotten().tolist() == [2, 4]
    assert len(twice.retained()) == N - 2
    assert twice.fingerprint() == once.fingerprint()


def test_deleted_examples_neither_stay_nor_are_forgotten(perceptrons: Problem) -> None:
    """Those that the fit was made without, and those that were deleted since."""
    assert perceptrons.train is not None
    fit = type(perceptrons.fit).model_validate({**perceptrons.fit.model_dump(), "left_out": [5]})
    train = TrainSpec.model_validate({**perceptrons.train.model_dump(), "left_out": [1, 5]})
    spec = perceptrons.spec(NEWTON, forget=[2, 4], fit=fit, train=train)
    assert spec.retained().tolist() == [row for row in range(N) if row not in (1, 2, 4, 5)]
    assert spec.kept().nonzero()[0].tolist() == spec.retained().tolist()


@pytest.mark.parametrize(
    ("chosen", "pointer"),
    [
        ({"oracles": 1}, "/oracles"),
        ({"oracles": 2, "train": None}, "/oracles"),
        ({"baselines": [{"type": "fine_tune"}]}, "/baselines"),
        ({"method": {"type": "exact_newton"}}, "/method/type"),
        ({"oracles": 2, "baselines": [{"type": "fine_tune"}, {"type": "exact_newton"}]}, "/baselines/1/type"),
    ],
)
def test_requests_that_cannot_be_done(perceptrons: Problem, chosen: dict[str, Any], pointer: str) -> None:
    assert refused(perceptrons.spec(chosen.pop("method", NEWTON), **chosen)) == pointer


@pytest.mark.parametrize(
    ("method", "fitted"),
    [
        ("newton", {"type": "grad_dot"}),
        ("newton", {"type": "trak"}),
        ("newton", {"type": "arnoldi"}),
        ("datamodel_matching", {"type": "grad_cos"}),
    ],
)
def test_indexes_that_a_method_cannot_use(perceptrons: Problem, method: str, fitted: dict[str, Any]) -> None:
    fit = type(perceptrons.fit).model_validate({**perceptrons.fit.model_dump(), "method": fitted})
    assert refused(perceptrons.spec({"type": method}, fit=fit)) == "/method/type"


def test_matching_takes_the_estimators_of_the_index(perceptrons: Problem) -> None:
    fit = type(perceptrons.fit).model_validate({**perceptrons.fit.model_dump(), "method": {"type": "grad_dot"}})
    spec = perceptrons.spec({"type": "datamodel_matching", "estimator": "newton"}, fit=fit)
    assert refused(spec) == "/method/estimator"


def test_rows_of_the_test_set_must_exist(perceptrons: Problem) -> None:
    test = {"dataset": perceptrons.test, "rows": [100]}
    assert refused(perceptrons.spec(NEWTON, test=test)) == "/test/rows"


def test_a_recipe_of_another_training_set(perceptrons: Problem) -> None:
    assert perceptrons.train is not None
    other = {**perceptrons.train.model_dump(), "dataset": perceptrons.test}
    assert refused(perceptrons.spec(NEWTON, oracles=2, train=TrainSpec.model_validate(other))) == "/train"


def test_whatever_decides_the_result_is_in_the_fingerprint(perceptrons: Problem) -> None:
    plain = perceptrons.spec(NEWTON)
    others = [
        perceptrons.spec({"type": "newton", "damping": 0.2}),
        perceptrons.spec(NEWTON, forget=[1]),
        perceptrons.spec(NEWTON, train=None),
        perceptrons.spec(NEWTON, oracles=4),
        perceptrons.spec(NEWTON, oracles=4, first_seed=7),
        perceptrons.spec(NEWTON, oracles=4, semantics="mask"),
        perceptrons.spec(NEWTON, oracles=4, test={"dataset": perceptrons.test}),
        perceptrons.spec(NEWTON, oracles=4, baselines=[{"type": "gradient_ascent"}]),
    ]
    assert len({spec.fingerprint() for spec in [plain, *others]}) == 1 + len(others)
    assert UnlearnSpec.model_validate_json(plain.model_dump_json()).fingerprint() == plain.fingerprint()
