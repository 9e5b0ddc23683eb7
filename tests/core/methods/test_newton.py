"""The effect of groups beyond the sum of scores: against dense matrices, and against refits of convex models without them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attribution_core.curvature.fisher import Fisher
from attribution_core.curvature.vectors import flattened
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError, SingularCurvatureError
from attribution_core.method_spec import METHODS, ProjectionSpec
from attribution_core.methods import base, woodbury
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.trak import Trak
from attribution_core.projection import build_projection
from attribution_core.tasks import build_task
from tests.core.methods.problems import SMALL, Problem, gradients, relative_error, tempered, training_batch
from tests.core.methods.test_exact import queries_of
from tests.core.methods.test_retraining import L2, N, agreement, convex, margins, refitted
from tests.core.methods.test_scores import SHARP, ekfac_inverse, measured, negative_loss

GROUP = np.arange(3, 60, 3)
FACTORED = {"type": "factored", "dim": 40, "seed": 2}
NEWTON: dict[str, dict[str, Any]] = {
    "ekfac": {"type": "ekfac", "projection": SMALL, "axes": "positions", "whole_layers": 0, "residual_power": 1},
    "ekfac of whole layers": {"type": "ekfac", "projection": SMALL, "residual_power": 1},
    "kfac": {"type": "kfac", "projection": SMALL, "residual_power": 1},
    "diagonal": {"type": "diagonal", "projection": SMALL, "residual_power": 1},
    "gauss_newton": {
        "type": "gauss_newton",
        "residual_power": 1,
        "projection": SMALL,
        "damping": 0.1,
        "shrinkage": 0,
        "negligible": 0,
        "iterations": 200,
        "tolerance": 1e-7,
    },
    "logra": {"type": "logra", "projection": FACTORED, "damping": 0.1},
    "trak": {"type": "trak", "projection": SHARP, "damping": 0.1},
    "trak fisher": {"type": "trak", "projection": SHARP, "curvature": "fisher", "damping": 0.1},
}


def newton(index: LoadedIndex, given: Problem, *groups: np.ndarray, damping: float | None = None) -> np.ndarray:
    return index.newton_effects(index.query(given.queries(), damping), groups)


def draws_of(index: LoadedIndex, rows: np.ndarray) -> Tensor:
    """All-class pseudo-gradients of some training examples, (rows, classes, P) float64."""
    checkpoint, batch = index.members[0].checkpoint, index.context.source.batch(rows)
    draws = Fisher("exact", 1, 0).draws(checkpoint.run(batch), checkpoint.task, batch)
    return torch.stack([flattened([part.materialise() for part in draw]) for draw in draws], dim=1).double()


@pytest.mark.parametrize("damping", [0.03, 1.0])
def test_ekfac_without_a_group_has_the_others_eigenvalues(problem: Problem, damping: float) -> None:
    module, staying = problem.modules()[0], torch.ones(60, dtype=torch.bool)
    staying[GROUP] = False
    inverse = ekfac_inverse(module, problem.inputs, damping, staying)
    expected = measured(problem, module, "margin") @ inverse @ negative_loss(problem, module)[GROUP].sum(0) / 60
    found = newton(problem.fit("ekfac", method=NEWTON["ekfac"]), problem, GROUP, damping=damping)
    assert relative_error(found[:, 0], expected) < 1e-4


@pytest.mark.parametrize("subset", [None, 30])
def test_gauss_newton_without_a_group_is_the_dense_solve(problem: Problem, subset: int | None) -> None:
    """With fewer examples the others stand for all that stay."""
    index = problem.fit("gn", method={**NEWTON["gauss_newton"], "curvature_examples": subset})
    module = problem.modules()[0]
    used = np.arange(60) if subset is None else np.unique(np.linspace(0, 59, subset).round().astype(int))
    rows = draws_of(index, np.setdiff1d(used, GROUP))
    matrix = torch.einsum("ncp,ncq->pq", rows, rows) * (60 - len(GROUP)) / len(rows) / 60
    factors = index.members[0].curvature._factors  # type: ignore[attr-defined]
    sizes = [block.numel for block in factors.basis.blocks]
    rates = torch.cat([torch.full((size,), rate) for size, rate in zip(sizes, factors.rates(0.1), strict=True)])
    inverse = torch.linalg.inv(matrix + torch.diag(rates.double()))
    expected = measured(problem, module, "margin") @ inverse @ negative_loss(problem, module)[GROUP].sum(0) / 60
    assert relative_error(newton(index, problem, GROUP)[:, 0], expected) < 1e-3


def test_shrunk_gauss_newton_without_a_group_has_the_others_ekfac(problem: Problem) -> None:
    module, staying = problem.modules()[0], torch.ones(60, dtype=torch.bool)
    staying[GROUP] = False
    method = {**NEWTON["gauss_newton"], "shrinkage": 0.4, "axes": "positions", "whole_layers": 0}
    index = problem.fit("gn", method=method)
    rows = draws_of(index, np.flatnonzero(staying))
    factors = index.members[0].curvature._factors  # type: ignore[attr-defined]
    sizes = [block.numel for block in factors.basis.blocks]
    rates = torch.cat([torch.full((size,), rate) for size, rate in zip(sizes, factors.rates(0.1), strict=True)])
    matrix = torch.einsum("ncp,ncq->pq", rows, rows) / 60 + torch.diag(rates.double())
    ekfac = torch.linalg.inv(ekfac_inverse(module, problem.inputs, 0.1, staying))
    inverse = torch.linalg.inv(0.6 * matrix + 0.4 * ekfac)
    expected = measured(problem, module, "margin") @ inverse @ negative_loss(problem, module)[GROUP].sum(0) / 60
    assert relative_error(newton(index, problem, GROUP)[:, 0], expected) < 1e-3


def test_a_group_of_all_known_curvature_is_refused(problem: Problem) -> None:
    index = problem.fit("gn", method={**NEWTON["gauss_newton"], "curvature_examples": 1})
    with pytest.raises(InvalidInputError, match="every example"):
        newton(index, problem, np.arange(30))


@pytest.mark.parametrize("damping", [0.1, 2.0])
def test_explicit_gauss_newton_without_a_group_is_the_dense_solve(problem: Problem, damping: float) -> None:
    index = problem.fit("whole", method={"type": "explicit", "curvature": "gauss_newton", "l2": 0.01})
    module, draws = problem.modules()[0], draws_of(index, np.arange(60))
    matrices = torch.einsum("ncp,ncq->npq", draws, draws) / 60
    whole = matrices.sum(0) + 0.01 * torch.eye(57).double()
    damped = whole - matrices[GROUP].sum(0) + damping * whole.trace() / 57 * torch.eye(57).double()
    effect = torch.linalg.solve(damped, negative_loss(problem, module)[GROUP].sum(0)) / 60
    expected = measured(problem, module, "margin") @ effect
    assert relative_error(newton(index, problem, GROUP, damping=damping)[:, 0], expected) < 1e-4


def test_what_is_left_of_a_hessian_may_be_no_curvature(problem: Problem) -> None:
    index = problem.fit("hessian", method={"type": "explicit", "damping": 2.0})
    assert np.isfinite(newton(index, problem, GROUP)).all()
    with pytest.raises(SingularCurvatureError, match="larger damping") as caught:
        newton(index, problem, GROUP, damping=1e-6)
    assert caught.value.pointer == "/damping"


def test_a_group_whose_own_matrix_would_take_too_long_is_refused(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = problem.fit("whole", method={"type": "explicit", "curvature": "gauss_newton"})
    monkeypatch.setattr(base, "MAX_GROUP_PRODUCTS", 57 * len(GROUP) - 1)
    with pytest.raises(InvalidInputError, match="use additive") as caught:
        newton(index, problem, GROUP)
    assert caught.value.pointer == "/estimator"


@pytest.mark.parametrize("curvature", ["gauss_newton", "fisher"])
def test_trak_without_a_group_is_the_dense_solve_of_every_member(ensemble: Problem, curvature: str) -> None:
    index = ensemble.fit("trak", method={"type": "trak", "projection": SHARP, "curvature": curvature, "damping": 0.1})
    task, solved, misfits = build_task(ensemble.spec.task), [], []
    for number, module in enumerate(ensemble.modules()):
        spec = ProjectionSpec.model_validate(SHARP)
        sketch = build_projection(spec.model_copy(update={"seed": spec.seed + (number << 32)})).matrix(57)
        phi = gradients(module, training_batch(ensemble), task.log_odds) @ sketch
        with torch.no_grad():
            p = module(ensemble.inputs).softmax(1)
        q = p.gather(1, ensemble.targets[:, None])[:, 0]
        rows = phi * (q * (1 - q)).sqrt()[:, None]
        if curvature == "fisher":
            parts = []
            for label in range(3):
                labels = Batch(torch.arange(60), ensemble.inputs, torch.full((60,), label))
                parts.append(gradients(module, labels, task.loss) @ sketch * p[:, label : label + 1].sqrt())
            rows = torch.stack(parts, 1)
        rows = rows.reshape(60, -1, 64)
        kernel, leaving = (torch.einsum("ncp,ncq->pq", part, part) for part in (rows, rows[GROUP]))
        damped = kernel - leaving + 0.1 * kernel.trace() / 64 * torch.eye(64).double()
        solved.append(measured(ensemble, module, "margin") @ sketch @ torch.linalg.inv(damped) @ phi[GROUP].T)
        misfits.append(tempered(1 - q, 0.6)[GROUP])
    expected = torch.stack(solved).mean(0) @ torch.stack(misfits).mean(0)
    assert relative_error(newton(index, ensemble, GROUP)[:, 0], expected) < 1e-4


def test_logra_without_a_group_is_the_dense_solve(problem: Problem) -> None:
    index = problem.fit("logra", method=NEWTON["logra"])
    member = index.members[0]
    query = member.encode_query(problem.queries()).rows.double()
    rows = torch.from_numpy(index.store.read(np.arange(60))).double()
    expected = torch.zeros(4).double()
    for part in member.projection.slices:  # type: ignore[attr-defined]
        fisher, leaving = (rows[some][:, part].T @ rows[some][:, part] for some in (np.arange(60), GROUP))
        damped = fisher - leaving + 0.1 * fisher.trace() / len(fisher) * torch.eye(len(fisher)).double()
        expected += query[:, part] @ torch.linalg.solve(damped, rows[GROUP][:, part].sum(0))
    assert relative_error(newton(index, problem, GROUP)[:, 0], expected) < 1e-4


@pytest.mark.parametrize("name", NEWTON)
def test_weak_groups_have_the_effect_of_their_scores_alone(problem: Problem, name: str) -> None:
    """At a damping that dwarfs the curvature no group takes much of it along; at the default every one does."""
    index = problem.fit("weak", method=NEWTON[name])
    for damping, same in ((1e4, True), (None, False)):
        query = index.query(problem.queries(), damping)
        both = index.newton_effects(query, [GROUP]), index.group_effects(query, [GROUP], rescore=True)
        assert (relative_error(*both) < 1e-3) is same


@pytest.mark.parametrize("name", NEWTON)
def test_groups_do_not_depend_on_batches_or_order(problem: Problem, name: str) -> None:
    index = problem.fit("batches", method=NEWTON[name])
    expected = newton(index, problem, GROUP, np.empty(0, np.int64))
    other = LoadedIndex(index.folder, problem.with_(method=NEWTON[name], batch_size=5))
    assert relative_error(newton(other, problem, GROUP[::-1].copy())[:, 0], expected[:, 0]) < 1e-4
    assert not expected[:, 1].any()


@pytest.mark.parametrize(
    "name", [n for n, spec in METHODS.items() if spec.needs == ("checkpoints",) and "newton" not in spec.estimators]
)
def test_methods_without_it_say_so(problem: Problem, name: str) -> None:
    quick = {"lissa": {"depth": 2}, "cg": {"iterations": 2}, "arnoldi": {"iterations": 2}, "explicit": {"damping": 10}}
    index = problem.fit("none", method={"type": name, **quick.get(name, {})})
    with pytest.raises(InvalidInputError) as caught:
        newton(index, problem, GROUP, damping=10.0)
    assert caught.value.pointer == "/estimator"


@pytest.mark.parametrize("change", [{"curvature": "gradient"}, {"soft_threshold": 0.1}])
def test_scores_without_scale_have_no_newton_estimator(problem: Problem, change: dict[str, Any]) -> None:
    index = problem.fit("none", method={**NEWTON["trak"], **change})
    assert isinstance(index.members[0], Trak)
    with pytest.raises(InvalidInputError) as caught:
        newton(index, problem, GROUP)
    assert caught.value.pointer == "/estimator"


def test_a_kernel_that_a_group_makes_singular_is_refused() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4))
    values, vectors = np.linalg.eigh(rows.T @ rows)
    assert np.isfinite(woodbury.Kernel(values, vectors, 0.1).solve_without([rows], rows[0])).all()
    with pytest.raises(SingularCurvatureError, match="without this group"):
        woodbury.Kernel(values, vectors, 0.0).solve_without([rows], rows[0])


@pytest.mark.parametrize("count", [2, 9, 40])
def test_woodbury_in_either_size(count: int) -> None:
    """Many more rows than dimensions are folded as they come."""
    rows = np.random.default_rng(1).normal(size=(60, 8))
    leaving, vector = rows[:count], rows[-1]
    kernel = rows.T @ rows
    values, vectors = np.linalg.eigh(kernel)
    expected = np.linalg.solve(kernel - leaving.T @ leaving + 0.2 * values.mean() * np.eye(8), vector)
    found = woodbury.Kernel(values, vectors, 0.2).solve_without(np.array_split(leaving, 3), vector)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_groups_and_features_that_are_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(woodbury, "MAX_SIDE", 7)
    kernel = woodbury.Kernel(np.ones(8), np.eye(8), 0.1)
    with pytest.raises(InvalidInputError, match="up to 7"):
        kernel.solve_without([np.ones((9, 8))], np.ones(8))
    kernel.solve_without([np.eye(8)[:7] / 10], np.ones(8))


@pytest.fixture(scope="module")
def penalised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, Batch, np.ndarray]:
    given, exact = convex(tmp_path_factory.mktemp("multinomial"), 3, L2)
    return given, queries_of(given, 3), exact.numpy()


@pytest.mark.parametrize(("name", "tolerance"), [("gauss_newton", 0.02), ("trak fisher", 0.06)])
def test_groups_of_one_have_the_slope_that_scores_lack(
    penalised: tuple[Problem, Batch, np.ndarray], name: str, tolerance: float
) -> None:
    """The curvature that one example takes along is its leverage: ALO for any model."""
    given, batch, exact = penalised
    index = given.fit("single", method=NEWTON[name])
    query, rows = index.query(batch, L2 / mean_curvature(index)), np.arange(0, N, 8)
    _, slope = agreement(index.newton_effects(query, [np.array([row]) for row in rows]), exact[:, rows])
    _, additive = agreement(index.scores(query, rows, rescore=True), exact[:, rows])
    assert abs(slope - 1) < tolerance
    assert abs(slope - 1) < 0.6 * abs(additive - 1)


@pytest.fixture(scope="module")
def multinomial(
    penalised: tuple[Problem, Batch, np.ndarray],
) -> tuple[Problem, Batch, list[np.ndarray], np.ndarray]:
    """Three classes, groups of a third of the training set, and the exact refits' effects (queries, groups)."""
    given, batch, _ = penalised
    groups = [np.sort(np.random.default_rng(seed).choice(N, N // 3, replace=False)) for seed in range(10)]
    full = refitted(given.inputs, given.targets, 3, L2)
    realised = []
    for rows in groups:
        rest = np.setdiff1d(np.arange(N), rows)
        theta = refitted(given.inputs[rest], given.targets[rest], 3, L2 * N / len(rest), full)
        before, after = (margins(t, batch.inputs.double(), batch.targets) for t in (full, theta))
        realised.append((before - after).numpy())
    return given, batch, groups, np.stack(realised, axis=1)


def mean_curvature(index: LoadedIndex) -> float:
    """The mean eigenvalue that damping is a multiple of, of a mean loss."""
    member = index.members[0]
    if isinstance(member, Trak):
        assert member._kernel is not None
        return float(member._kernel["values"].mean()) / N
    curvature: Any = getattr(member, "curvature", None)
    factors = getattr(curvature, "_factors", curvature)
    return float(factors.eigenvalues[0].mean())


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("exact", 0.08), ("gauss_newton", 0.08), ("ekfac", 0.22), ("ekfac of whole layers", 0.08), ("trak fisher", 0.08)],
)
def test_large_groups_are_predicted_at_their_scale(
    multinomial: tuple[Problem, Batch, list[np.ndarray], np.ndarray], name: str, tolerance: float
) -> None:
    """The sum of scores falls short, as each divides by curvature that has left with the others."""
    given, batch, groups, realised = multinomial
    if name == "exact":
        index = given.fit("exact", method={"type": "exact", "l2": L2, "regulariser": "fixed"})
        damping = None
    else:
        index = given.fit("large", method=NEWTON[name])
        damping = L2 / mean_curvature(index)
    query = index.query(batch, damping)
    correlation, slope = agreement(index.newton_effects(query, groups), realised)
    sums = agreement(index.group_effects(query, groups, rescore=True), realised)
    assert abs(slope - 1) < tolerance
    assert abs(slope - 1) < abs(sums[1] - 1) / 2
    assert correlation > sums[0] - 0.01
