"""Which method `auto` stands for, rung by rung."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from attribution_core.auto import Situation, chosen
from attribution_core.method_spec import AutoMethod, ExactMethod, ExplicitMethod
from tests.core.methods.problems import Problem, classification, regression
from tests.core.methods.test_exact import ridge_problem

AUTO = AutoMethod(type="auto", l2=0.25)
MLP = Situation("mlp", "classification", 17_000, 1_000)
LINEAR = Situation("linear", "regression", 3_000_000, 50_000, num_features=785)
LOGISTIC = Situation("logistic", "classification", 7_850, 50_000, num_features=785)


@pytest.mark.parametrize(
    ("situation", "method", "reason"),
    [
        (LINEAR, "exact", "closed form"),
        (LOGISTIC, "exact", "ALO"),
        (dataclasses.replace(LOGISTIC, num_parameters=6, num_examples=1), "explicit", "small enough"),
        (dataclasses.replace(LOGISTIC, num_parameters=100_000), "ekfac", "whatever the size"),
        (dataclasses.replace(LINEAR, num_features=20_000), "ekfac", "whatever the size"),
        (dataclasses.replace(LOGISTIC, all_layers=False), "ekfac", "whatever the size"),
        (dataclasses.replace(LOGISTIC, all_layers=False, num_examples=20_000), "gauss_newton", "passes"),
        (dataclasses.replace(MLP, num_parameters=1_500), "explicit", "1,500 parameters"),
        (dataclasses.replace(MLP, num_parameters=1_500, num_examples=10_000), "gauss_newton", "passes"),
        (MLP, "gauss_newton", "shrunk"),
        (dataclasses.replace(MLP, num_parameters=10_000_000), "ekfac", "whatever the size"),
        (dataclasses.replace(MLP, architecture="cnn"), "gauss_newton", "every network"),
        (dataclasses.replace(MLP, architecture="cnn", num_parameters=900), "gauss_newton", "every network"),
        (Situation("transformer_lm", "causal_lm", 900, 100), "gauss_newton", "every network"),
        (Situation("transformer_lm", "causal_lm", 300_000, 1_000), "ekfac", "every layer"),
        (Situation("somebodys-plugin", "classification", 900, 100), "gauss_newton", "every network"),
    ],
)
def test_the_first_rung_that_fits_is_taken_and_says_why(situation: Situation, method: str, reason: str) -> None:
    found, choice = chosen(AUTO, situation)
    assert found.type == method
    assert reason in choice.reason
    assert [rung.taken for rung in choice.considered] == [False] * (len(choice.considered) - 1) + [True]
    assert choice.considered[-1].method == method
    assert all(rung.reason for rung in choice.considered)
    order = ["exact", "explicit", "gauss_newton", "ekfac"]
    assert [rung.method for rung in choice.considered] == order[: len(choice.considered)]
    if isinstance(found, ExactMethod | ExplicitMethod):
        assert found.l2 == AUTO.l2


@pytest.mark.parametrize("kind", ["ridge", "perceptron", "real"])
def test_what_is_chosen_can_be_fitted(tmp_path: Path, kind: str) -> None:
    given: Problem = {
        "ridge": lambda: ridge_problem(tmp_path, 2, True)[0],
        "perceptron": lambda: classification(tmp_path),
        "real": lambda: regression(tmp_path),
    }[kind]()
    parameters = sum(p.numel() for p in given.modules()[0].parameters())
    situation = Situation(given.spec.architecture.name, given.spec.task.type, parameters, len(given.inputs), 6)
    method, _ = chosen(AUTO, situation)
    index = given.fit("auto", method=method, store={"layout": "auto"})
    assert np.isfinite(index.self_influence()).all()
    assert index.self_influence().any()


def test_choosing_needs_no_torch() -> None:
    program = "import sys, attribution_core.auto; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
