"""Examples count by a power of their shortfall, whatever is measured, stored or asked."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.curvature.fisher import ShortfallSums
from attribution_core.methods.artifact import FACTORS_FILE
from attribution_core.methods.base import GradientMethod
from attribution_core.methods.context import FitContext
from attribution_core.methods.fit import FitPipeline
from attribution_core.methods.fitted import TEMPERING
from attribution_core.progress import NoProgress
from tests.core.methods.problems import SMALL, Problem, relative_error, shortfall, training_batch
from tests.core.methods.test_retraining import convex
from tests.core.methods.test_scores import scores

TEMPERED = ("ekfac", "kfac", "diagonal", "gauss_newton")


@pytest.mark.parametrize("layout", ["vectors", "factors"])
@pytest.mark.parametrize("measurement", ["margin", "log_likelihood", "logit", "loss"])
@pytest.mark.parametrize("kind", TEMPERED)
def test_scores_are_those_of_the_derivative_times_a_power(
    problem: Problem, kind: str, measurement: str, layout: str
) -> None:
    method = {"type": kind, "projection": SMALL, "damping": 0.3}
    chosen = {"measurement": measurement, "store": {"layout": layout}}
    derivative = problem.fit("derivative", method={**method, "residual_power": 1}, **chosen)
    tempered = problem.fit("tempered", method={**method, "residual_power": 0.5}, **chosen)
    each = shortfall(problem)
    weights = each**-0.5 * each.mean() / np.sqrt(each).mean()
    assert relative_error(scores(tempered, problem), scores(derivative, problem) * weights) < 1e-5
    if kind != "gauss_newton":
        assert relative_error(tempered.self_influence(), derivative.self_influence() * weights) < 1e-5
    groups = [np.arange(5), np.array([7, 11])]
    query = tempered.query(problem.queries(), None)
    expected = np.stack([scores(tempered, problem)[:, rows].sum(1) for rows in groups], axis=1)
    assert relative_error(tempered.group_effects(query, groups, rescore=True), expected) < 1e-5


@pytest.mark.parametrize("curvature", ["gradient", "gauss_newton", "fisher"])
def test_traks_scores_are_those_of_its_residuals_times_a_power(problem: Problem, curvature: str) -> None:
    """The kernel stays that of the residuals, so that nothing but the examples' weights changes. (An ensemble's mean of them is tested in test_scores.py.)"""
    method = {"type": "trak", "curvature": curvature, "projection": SMALL, "damping": 0.3}
    chosen = {"checkpoints": problem.spec.checkpoints[:1], "shard_size": 13}
    plain = problem.fit("plain", method={**method, "residual_power": 1}, **chosen)
    tempered = problem.fit("tempered", method={**method, "residual_power": 0.5}, **chosen)
    each = shortfall(problem)
    weights = each**-0.5 * each.mean() / np.sqrt(each).mean()
    assert relative_error(scores(tempered, problem), scores(plain, problem) * weights) < 1e-5
    assert relative_error(tempered.self_influence(), plain.self_influence() * weights) < 1e-5
    if curvature != "gradient":
        query, groups = tempered.query(problem.queries(), None), [np.array([4])]
        alone = plain.newton_effects(plain.query(problem.queries(), None), groups) * weights[4]
        assert relative_error(tempered.newton_effects(query, groups), alone) < 1e-5


def test_trak_tempers_by_default_but_for_its_published_kernel(problem: Problem) -> None:
    for curvature, power in (("gauss_newton", 0.6), ("fisher", 0.6), ("gradient", 1.0)):
        method = {"type": "trak", "curvature": curvature, "projection": SMALL}
        assert FitContext(problem.with_(method=method)).defaults.residual_power == power


@pytest.mark.parametrize("kind", [*TEMPERED, "trak"])
def test_perturbed_copies_are_tempered_less(problem: Problem, kind: str) -> None:
    """Noise on the weights makes a network less sure of its training examples, and a short training not sure again."""
    for copies, power in ((None, 0.6), ({"copies": 2}, 0.8), ({"copies": 2, "training": {}}, 0.8)):
        method = {"type": kind, "projection": SMALL, "perturbation": copies}
        assert FitContext(problem.with_(method=method)).defaults.residual_power == power


@pytest.mark.parametrize("kind", TEMPERED)
def test_the_default_is_stored_and_what_stores_none_has_the_derivative(problem: Problem, kind: str) -> None:
    index = problem.fit("index", method={"type": kind}, shard_size=13)
    fitted = read_arrays(index.folder / FACTORS_FILE)
    each = shortfall(problem)
    assert fitted[f"0.{TEMPERING}"] == pytest.approx([0.6, (each**0.6).mean() / each.mean()], rel=1e-5)
    before = {name: value for name, value in fitted.items() if TEMPERING not in name}
    powers = [index.context.method(0, arrays).tempering.power for arrays in (fitted, before)]  # type: ignore[attr-defined]
    assert powers == [pytest.approx(0.6), 1.0]


def test_a_shard_of_before_there_were_sums_of_residuals_is_computed_again(problem: Problem, tmp_path: Path) -> None:
    spec = problem.with_(method={"type": "ekfac"}, shard_size=25)
    pipeline, files = FitPipeline(spec, tmp_path / "work"), [tmp_path / str(number) for number in range(3)]
    shards = [pipeline.run_shard("covariance", number, NoProgress()) for number in range(3)]
    reduced = []
    for missing in ((), (1,)):
        for number, path in enumerate(files):
            left_out = ShortfallSums.NAME if number in missing else None
            write_arrays(path, {name: value for name, value in shards[number].items() if name != left_out})
        reduced.append(pipeline.reduce("covariance", files, NoProgress()))
    assert reduced[0][f"0.{ShortfallSums.NAME}"][0] == pytest.approx(shortfall(problem).sum(), rel=1e-5)
    assert reduced[0].keys() == reduced[1].keys()
    assert all(np.array_equal(value, reduced[1][name]) for name, value in reduced[0].items())


def test_a_model_of_one_layer_keeps_the_derivative(tmp_path: Path) -> None:
    """Its loss is convex; whatever is asked for is taken."""
    given, _ = convex(tmp_path, classes=3, l2=0.1)
    for asked, taken in ((None, 1.0), (0.5, 0.5)):
        method = {"type": "ekfac", "residual_power": asked}
        assert FitContext(given.with_(method=method)).defaults.residual_power == taken
        fitted = read_arrays(given.fit(str(asked), method=method).folder / FACTORS_FILE)
        assert (f"0.{TEMPERING}" in fitted) == (taken != 1)


def test_only_a_power_that_is_named_decides_the_fingerprint(problem: Problem) -> None:
    methods = [{"type": "ekfac", **chosen} for chosen in ({}, {"residual_power": None}, {"residual_power": 0.6})]
    first, second, third = (problem.with_(method=method).fingerprint() for method in methods)
    assert first == second != third


def test_an_example_that_the_model_is_sure_of_counts_for_nothing(problem: Problem) -> None:
    index = problem.fit("sure", method={"type": "ekfac"})
    member = index.members[0]
    assert isinstance(member, GradientMethod)
    with torch.no_grad():
        for parameter in member.checkpoint.module.parameters():
            parameter.mul_(1e6)
    batch = training_batch(problem)
    observed = member.attributed(replace(batch, inputs=batch.inputs.float()))
    assert observed.shortfall is not None
    assert float(observed.shortfall.min()) == 0
    assert observed.multiple.isfinite().all()
    assert (observed.multiple[observed.shortfall == 0] == 0).all()
