"""Fits that cannot work say why, and those that can do: examples at fault, dead layers, nothing left to train on."""

from typing import Any

import pytest

from attribution_core.errors import InvalidInputError
from tests.core.methods import problems
from tests.core.methods.problems import MLP, SMALL, Problem

BAD = 37
CURVATURES: list[dict[str, Any]] = [
    {"type": "ekfac"},
    {"type": "kfac"},
    {"type": "diagonal"},
    {"type": "gauss_newton"},
    {"type": "explicit"},
    {"type": "arnoldi"},
    {"type": "datainf"},
    {"type": "lissa"},
    {"type": "cg"},
    {"type": "source", "segments": 1},
]


@pytest.fixture(scope="module", params=[1e30, 3e38])
def overflowing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """A problem with an example whose gradient is not finite, or has no finite square."""
    given = problems.classification(tmp_path_factory.mktemp("good"))
    inputs, folder = given.inputs.clone(), tmp_path_factory.mktemp("bad")
    inputs[BAD] = request.param
    return problems.problem(folder, inputs, given.targets, MLP, modules=[m.float() for m in given.modules()])


@pytest.mark.parametrize("layout", ["vectors", "factors"])
@pytest.mark.parametrize("method", CURVATURES, ids=lambda method: method["type"])
def test_the_training_example_without_finite_gradient_is_named(
    overflowing: Problem, method: dict[str, Any], layout: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"no finite gradient for training example {BAD}$"):
        overflowing.fit("bad", method={"projection": SMALL, **method}, store={"layout": layout})
