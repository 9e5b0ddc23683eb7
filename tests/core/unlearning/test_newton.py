"""Newton steps against dense algebra in float64, against the index's own predictions, and against refits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core.checkpoints import save_checkpoint
from attribution_core.errors import InvalidInputError
from attribution_core.fingerprint import sha256_file
from attribution_core.fit_spec import CheckpointRef
from attribution_core.methods.fit import fit
from attribution_core.progress import NoProgress
from attribution_core.tasks import build_task
from attribution_core.training.network import Network
from attribution_core.unlearning.pipeline import UnlearnPipeline
from tests.core.unlearning.problems import CLASSES, L2, SOURCE, N, Problem, features_of, logistic, refit, trained

SMALL = np.array([3, 40, 77])


def unlearned(problem: Problem, method: dict[str, Any], forget: np.ndarray = SOURCE, **chosen: Any) -> dict[str, Any]:
    spec = problem.spec(method, forget=forget.tolist(), **chosen)
    return UnlearnPipeline(spec, problem.folder / "unused").run_shard("unlearn", 0, NoProgress())


def parameters(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The weights (C, d) of the logistic regression, its bias last."""
    return np.concatenate([arrays["weights.output.weight"], arrays["weights.output.bias"][:, None]], axis=1)


def by_hand(
    problem: Problem,
    forget: np.ndarray,
    damping: float,
    l2: float,
    share: bool,
    shrinkage: float = 1.0,
    whole: bool = True,
) -> np.ndarray:
    """The step's formula with dense matrices made from nothing but features, targets and weights; EK-FAC's curvature if wholly shrunk."""
    theta, a = refit(problem, np.empty(0, np.int64)), features_of(problem.inputs)
    logits = a @ theta.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    pseudo = np.sqrt(p)[:, :, None] * (p[:, None, :] - np.eye(CLASSES))  # (n, label, C)
    draws = np.einsum("nlc,nd->nlcd", pseudo, a).reshape(N, CLASSES, theta.size)
    q_a = np.linalg.eigh(a.T @ a)[1]
    q_g = np.linalg.eigh(np.einsum("nlc,nle->ce", pseudo, pseudo))[1]
    basis = np.linalg.eigh(np.einsum("nlp,nlq->pq", draws, draws))[1] if whole else np.kron(q_g, q_a)
    shares = ((draws @ basis) ** 2).sum(1)  # of the eigenvalues, by example
    staying = np.delete(np.arange(N), forget) if share else np.arange(N)
    factored = basis @ np.diag(shares[staying].sum(0)) @ basis.T
    curvature = (1 - shrinkage) * np.einsum("nlp,nlq->pq", draws[staying], draws[staying]) + shrinkage * factored
    curvature += (N * damping * shares.mean(0).mean() + len(staying) * l2) * np.eye(theta.size)
    gradient = (p - np.eye(CLASSES)[problem.targets])[forget].T @ a[forget] + len(forget) * l2 * theta
    step = np.linalg.solve(curvature, gradient.ravel())
    return theta + step.reshape(theta.shape)


@pytest.mark.parametrize(("curvature", "damping", "l2"), [("rest", 0.1, L2), ("rest", 0.0, L2), ("all", 0.3, 0.0)])
@pytest.mark.parametrize("whole", [False, True])
def test_the_step_is_the_formula(tmp_path: Path, whole: bool, curvature: str, damping: float, l2: float) -> None:
    limit = 1280 if whole else 0
    problem = logistic(tmp_path, method={"type": "ekfac", "axes": "positions", "whole_layers": limit})
    method = {"type": "newton", "curvature": curvature, "damping": damping, "l2": l2}
    found = parameters(unlearned(problem, method))
    expected = by_hand(problem, SOURCE, damping, l2, curvature == "rest", whole=whole)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shrinkage", [0.0, 0.8])
@pytest.mark.parametrize(("curvature", "damping", "l2"), [("rest", 0.1, L2), ("rest", 0.0, L2), ("all", 0.3, 0.0)])
def test_the_step_is_solved_with_the_shrunk_gauss_newton_matrix(
    shrinkage: float, curvature: str, damping: float, l2: float, tmp_path: Path
) -> None:
    index = {"type": "gauss_newton", "shrinkage": shrinkage, "negligible": 0, "iterations": 200, "tolerance": 1e-6}
    problem = logistic(tmp_path, method=index)
    method = {"type": "newton", "curvature": curvature, "damping": damping, "l2": l2}
    found = parameters(unlearned(problem, method))
    expected = by_hand(problem, SOURCE, damping, l2, curvature == "rest", shrinkage)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "index",
    [
        {"type": "gauss_newton", "shrinkage": 0.0, "negligible": 0, "iterations": 200, "tolerance": 1e-6},
        {"type": "explicit", "curvature": "gauss_newton", "damping": 1.0},
        {"type": "explicit", "curvature": "hessian", "l2": L2},
    ],
)
def test_a_step_with_the_whole_matrix_is_the_exact_methods_step(index: dict[str, Any], tmp_path: Path) -> None:
    """Of a regression at its optimum the Gauss-Newton matrix is the Hessian, so nothing is left to approximate."""
    problem = logistic(tmp_path, method=index)
    start, goal = refit(problem, np.empty(0, np.int64)), refit(problem, SOURCE)
    solved = parameters(unlearned(problem, {"type": "newton", "l2": L2, "damping": 0.0}))
    exact = parameters(unlearned(problem, {"type": "exact_newton", "l2": L2, "estimator": "alo"}))
    assert np.abs(solved - exact).max() < 1e-5 * np.abs(exact).max()
    assert np.linalg.norm(solved - goal) < 0.3 * np.linalg.norm(goal - start)


def gradients_of(network: Network, weights: dict[str, torch.Tensor], problem: Problem) -> dict[str, np.ndarray]:
    """Every example's logit gradients (n, classes, parameters) and probabilities (n, classes), by differentiating the network itself."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    x = torch.from_numpy(problem.inputs).double()
    outputs = torch.func.functional_call(network.module, leaves, (x,))
    rows = [
        torch.cat([part.flatten() for part in torch.autograd.grad(logit, list(leaves.values()), retain_graph=True)])
        for logit in outputs.flatten()
    ]
    return {
        "jacobian": torch.stack(rows).reshape(N, CLASSES, -1).numpy(),
        "probabilities": outputs.detach().softmax(1).numpy(),
    }


@pytest.mark.parametrize("curvature", ["rest", "all"])
def test_a_networks_step_is_that_of_the_explicit_matrix(curvature: str, tmp_path: Path) -> None:
    """`Σ_i J_iᵀ (diag p - p pᵀ) J_i` over all layers at once, with each layer's λ and the penalty of what stays."""
    index = {"type": "gauss_newton", "shrinkage": 0.0, "negligible": 0, "iterations": 500, "tolerance": 1e-7}
    problem, damping, l2 = trained(tmp_path, 1, method=index), 0.1, 5e-3
    method = {"type": "newton", "curvature": curvature, "damping": damping, "l2": l2}
    found = unlearned(problem, method)
    network = Network(problem.fit.architecture, build_task(problem.fit.task), dtype=torch.float64)
    weights = network.initial(0, problem.fit.checkpoints[0])
    given = gradients_of(network, weights, problem)
    p, jacobian = given["probabilities"], given["jacobian"]
    hessians = np.einsum("nc,cd->ncd", p, np.eye(CLASSES)) - np.einsum("nc,nd->ncd", p, p)
    matrices = np.einsum("ncp,ncd,ndq->npq", jacobian, hessians, jacobian, optimize=True)
    staying = np.delete(np.arange(N), SOURCE) if curvature == "rest" else np.arange(N)
    layers = np.concatenate([[name.rpartition(".")[0]] * value.numel() for name, value in weights.items()])
    diagonal = matrices.mean(0).diagonal()
    rates = np.array([damping * diagonal[layers == layer].mean() for layer in layers])
    matrix = matrices[staying].sum(0) + np.diag(N * rates + len(staying) * l2)
    theta = torch.cat([value.flatten() for value in weights.values()]).numpy()
    slopes = np.einsum("nc,ncp->np", p - np.eye(CLASSES)[problem.targets], jacobian)
    expected = np.linalg.solve(matrix, slopes[SOURCE].sum(0) + len(SOURCE) * l2 * theta)
    change = np.concatenate([found[f"weights.{name}"].ravel() for name in weights]) - theta
    assert np.linalg.norm(change - expected) < 1e-4 * np.linalg.norm(expected)


def test_a_gauss_newton_step_does_not_depend_on_how_the_fit_was_divided(tmp_path: Path) -> None:
    index = {"type": "gauss_newton", "iterations": 200, "tolerance": 1e-6}
    steps = []
    for shard_size, batch_size in ((N, N), (40, 7), (11, 1)):
        folder = tmp_path / str(shard_size)
        folder.mkdir()
        problem = logistic(folder, method=index, shard_size=shard_size, batch_size=batch_size)
        steps.append(parameters(unlearned(problem, {"type": "newton", "l2": L2})) - refit(problem, SOURCE[:0]))
    for step in steps[1:]:
        assert np.abs(step - steps[0]).max() < 1e-5 * np.abs(steps[0]).max()


def test_a_scaled_step_goes_its_share_of_the_way(regression: Problem) -> None:
    start = refit(regression, np.empty(0, np.int64))
    whole = parameters(unlearned(regression, {"type": "newton", "l2": L2})) - start
    half = parameters(unlearned(regression, {"type": "newton", "l2": L2, "scale": 0.5})) - start
    assert np.allclose(half, whole / 2, atol=1e-6)


def test_without_a_penalty_the_step_does_what_the_index_predicts(perceptrons: Problem) -> None:
    """To first order outputs move by minus the group's effect, additive or Newton's; layers and biases are where they belong."""
    for curvature in ("all", "rest"):
        tiny = 1e-3
        method = {"type": "newton", "curvature": curvature, "l2": 0.0, "scale": tiny, "damping": 0.5}
        pipeline = UnlearnPipeline(perceptrons.spec(method, forget=SMALL.tolist()), perceptrons.folder / "unused")
        index, context = pipeline.subject.index, pipeline.subject.context
        queries = context.source.batch(np.arange(50, 60))
        query = index.query(queries, 0.5)
        additive, newton = index.group_effects(query, [SMALL], rescore=True), index.newton_effects(query, [SMALL])
        predicted = (additive if curvature == "all" else newton)[:, 0]
        moved = np.zeros(len(queries))
        for number in range(len(perceptrons.fit.checkpoints)):
            after = pipeline.run_shard("unlearn", number, NoProgress())
            network = Network(perceptrons.fit.architecture, context.task, dtype=torch.float64)
            before = network.initial(0, perceptrons.fit.checkpoints[number])
            weights = {name: torch.from_numpy(after[f"weights.{name}"]).double() for name in before}
            values = [
                context.task.measure(network.output(each, queries.to(torch.float64)), queries, "margin")
                for each in (before, weights)
            ]
            moved += (values[1] - values[0]).numpy() / tiny / len(perceptrons.fit.checkpoints)
        assert np.corrcoef(-predicted, moved)[0, 1] > 0.999
        assert np.abs(-predicted - moved).max() < 0.02 * np.abs(predicted).max()


def test_newton_comes_near_the_refit_and_the_exact_method_to_it(regression: Problem) -> None:
    start, goal = refit(regression, np.empty(0, np.int64)), refit(regression, SOURCE)
    whole = np.linalg.norm(goal - start)
    step = parameters(unlearned(regression, {"type": "newton", "l2": L2, "damping": 0.0}))
    exact = parameters(unlearned(regression, {"type": "exact_newton", "l2": L2}))
    single = parameters(unlearned(regression, {"type": "exact_newton", "l2": L2, "estimator": "alo"}))
    assert np.linalg.norm(step - goal) < 0.55 * whole
    assert np.abs(exact - goal).max() < 1e-6 * np.abs(goal).max()  # the rounding of float32
    assert np.linalg.norm(single - goal) < 0.3 * whole


def test_the_exact_step_is_nearly_the_refit_for_few_rows(regression: Problem) -> None:
    start, goal = refit(regression, np.empty(0, np.int64)), refit(regression, SMALL)
    found = parameters(unlearned(regression, {"type": "exact_newton", "l2": L2, "estimator": "alo"}, SMALL))
    assert np.linalg.norm(found - goal) < 0.05 * np.linalg.norm(goal - start)


def test_the_penalty_is_the_recipes_unless_given(perceptrons: Problem) -> None:
    decay = perceptrons.train.recipe.weight_decay if perceptrons.train else 0.0
    by_default = unlearned(perceptrons, {"type": "newton"})
    given = unlearned(perceptrons, {"type": "newton", "l2": decay})
    without = unlearned(perceptrons, {"type": "newton", "l2": 0.0})
    name = "weights.output.weight"
    assert np.array_equal(by_default[name], given[name])
    assert not np.allclose(by_default[name], without[name], atol=1e-3)


def test_a_line_search_shortens_a_step_that_overshoots(regression: Problem) -> None:
    plain = unlearned(regression, {"type": "newton", "l2": L2, "line_search": True})
    assert plain["report.scale"][0] == 1.0
    far = unlearned(regression, {"type": "newton", "l2": L2, "line_search": True, "scale": 64.0})
    goal, start = refit(regression, SOURCE), refit(regression, np.empty(0, np.int64))
    assert 0.25 <= far["report.scale"][0] <= 4.0
    assert np.linalg.norm(parameters(far) - goal) < np.linalg.norm(start - goal)


def test_a_line_search_that_finds_nothing_says_so(regression: Problem, tmp_path: Path) -> None:
    """Weights that are no optimum at all: what the forget set alone asks for can be uphill for the rest."""
    network = Network(regression.fit.architecture, build_task(regression.fit.task))
    start = refit(regression, np.empty(0, np.int64))
    weights = torch.from_numpy(-3 * start).float()  # wrong about nearly everyone
    path = tmp_path / "wrong.safetensors"
    save_checkpoint(network.loaded({"output.weight": weights[:, :-1], "output.bias": weights[:, -1]}), path)
    wrong = regression.fit.model_copy(
        update={"checkpoints": [CheckpointRef(id="wrong", path=path, sha256=sha256_file(path))]}
    )
    fit(wrong, tmp_path / "fit-work", tmp_path / "index", NoProgress())
    method = {"type": "newton", "line_search": True, "l2": 0.0}
    with pytest.raises(InvalidInputError, match="no step") as error:
        unlearned(regression, method, np.arange(100, 140), fit=wrong, index=tmp_path / "index")
    assert error.value.pointer == "/method/line_search"
