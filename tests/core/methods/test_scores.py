"""Scores of every method against direct computation in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attribution_core.arrays import read_arrays
from attribution_core.errors import SingularCurvatureError
from attribution_core.method_spec import METHODS, EkfacMethod, FisherMethod, ProjectionSpec
from attribution_core.methods.artifact import FACTORS_FILE
from attribution_core.methods.grad_cos import unit_length
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.methods.logra import Logra
from attribution_core.projection import build_projection
from attribution_core.tasks import build_task
from tests.core.methods.problems import SMALL, Problem, gradients, relative_error, tempered, training_batch
from tests.core.methods.test_fit import EVERY_METHOD

ALL = np.arange(60)
SHARP = {"type": "gaussian", "dim": 64, "seed": 1}
MEASUREMENTS = ["margin", "log_likelihood", "logit", "loss"]


def measured(given: Problem, module: nn.Module, measurement: str) -> Tensor:
    task = build_task(given.spec.task)
    return gradients(module, given.queries(), lambda output, batch: task.measure(output, batch, measurement))


def negative_loss(given: Problem, module: nn.Module) -> Tensor:
    return -gradients(module, training_batch(given), build_task(given.spec.task).loss)


def scores(index: LoadedIndex, given: Problem, damping: float | None = None, *, rescore: bool = True) -> np.ndarray:
    return index.scores(index.query(given.queries(), damping), ALL, rescore=rescore)


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_grad_dot_is_the_inner_product_of_autograd_gradients(problem: Problem, measurement: str) -> None:
    module = problem.modules()[0]
    expected = measured(problem, module, measurement) @ negative_loss(problem, module).T / 60
    index = problem.fit("dot", measurement=measurement)
    assert relative_error(scores(index, problem), expected) < 1e-5


def test_projected_scores_use_exactly_the_stated_projection(problem: Problem) -> None:
    module = problem.modules()[0]
    sketch = build_projection(ProjectionSpec.model_validate(SMALL)).matrix(57)
    projected = (measured(problem, module, "margin") @ sketch) @ (negative_loss(problem, module) @ sketch).T / 60
    assert relative_error(scores(problem.fit("dot"), problem, rescore=False), projected) < 1e-5


def test_grad_cos_is_the_cosine(problem: Problem) -> None:
    module = problem.modules()[0]
    query, train = measured(problem, module, "margin"), negative_loss(problem, module)
    expected = (query / query.norm(dim=1, keepdim=True)) @ (train / train.norm(dim=1, keepdim=True)).T
    index = problem.fit("cos", method={"type": "grad_cos", "projection": SMALL})
    assert relative_error(scores(index, problem), expected) < 1e-5
    own = torch.stack(
        [
            torch.cosine_similarity(a, b, dim=0)
            for a, b in zip(
                gradients(module, training_batch(problem), build_task(problem.spec.task).log_odds), train, strict=True
            )
        ]
    )
    assert relative_error(index.self_influence(), own) < 1e-5


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_directions_survive_any_length(scale: float) -> None:
    """Squares of small gradients underflow and those of large ones overflow; a gradient of zero has no direction."""
    parts = [scale * torch.tensor([[3.0]]).view(1, 1, 1, 1), scale * torch.tensor([[4.0, 0.0]]).view(1, 1, 1, 2)]
    found = torch.cat([part.flatten() for part in unit_length(parts)])
    torch.testing.assert_close(found, torch.tensor([0.6, 0.8, 0.0]) * (scale > 0))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_representation_is_the_similarity_of_the_last_hidden_layer(problem: Problem, similarity: str) -> None:
    module = problem.modules()[0]
    head = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    module(problem.queries().inputs.double())
    module(problem.inputs)
    query, train = seen
    if similarity == "cosine":
        query, train = nn.functional.normalize(query), nn.functional.normalize(train)
    index = problem.fit("representation", method={"type": "representation", "similarity": similarity})
    assert not index.rescores
    assert relative_error(scores(index, problem), query @ train.T) < 1e-5


def ekfac_layers(
    modules: Sequence[nn.Module], inputs: Tensor, staying: Tensor | None = None, axes: str = "positions"
) -> list[tuple[Tensor, Tensor]]:
    """Per layer of the two-layer tanh network the eigenbasis (P, P) and eigenvalues (P,), averaged over networks, every factor written out.

    With `staying` (n,) bool the eigenvalues are those of some examples only, still divided by n, in the basis of all.
    """
    kept = torch.ones(len(inputs), dtype=torch.bool) if staying is None else staying
    ones = torch.ones(len(inputs), 1, dtype=torch.float64)
    seen: dict[str, list[tuple[Tensor, list[Tensor]]]] = {"first": [], "second": []}
    with torch.no_grad():
        for module in modules:
            first, second = [part for part in module.modules() if isinstance(part, nn.Linear)]
            hidden = torch.tanh(first(inputs))
            probabilities = second(hidden).softmax(1)
            for layer, a in (("first", torch.cat([inputs, ones], 1)), ("second", torch.cat([hidden, ones], 1))):
                pseudo = []
                for label in range(3):
                    g = (probabilities - nn.functional.one_hot(torch.tensor(label), 3)) * probabilities[
                        :, label : label + 1
                    ].sqrt()
                    pseudo.append(g if layer == "second" else (g @ second.weight) * (1 - hidden**2))
                seen[layer].append((a, pseudo))
        layers = []
        for parts in seen.values():
            gradients = torch.cat([torch.einsum("bo,bi->boi", g, a) for a, pseudo in parts for g in pseudo])
            if axes == "examples":
                moments = [(gradients.mT @ gradients).sum(0), (gradients @ gradients.mT).sum(0)]
            else:
                moments = [sum(a.T @ a for a, _ in parts), sum(g.T @ g for _, pseudo in parts for g in pseudo)]
            (_, q_in), (_, q_out) = (torch.linalg.eigh(moment) for moment in moments)
            squares = [
                torch.einsum("bo,bi->boi", g @ q_out, a @ q_in)[kept].square().sum(0) / len(inputs)
                for a, pseudo in parts
                for g in pseudo
            ]
            layers.append((torch.kron(q_out, q_in), torch.stack(squares).sum(0).flatten() / len(modules)))
    return layers


def ekfac_inverse(
    module: nn.Module, inputs: Tensor, damping: float, staying: Tensor | None = None, axes: str = "positions"
) -> Tensor:
    """Dense `(H + λ)⁻¹`: (P, P); with `staying` (n,) bool H is of some examples only, and the λ of all."""
    everything, some = (ekfac_layers([module], inputs, those, axes) for those in (None, staying))
    return torch.block_diag(
        *(
            basis @ torch.diag(1 / (values + damping * whole.mean())) @ basis.T
            for (basis, values), (_, whole) in zip(some, everything, strict=True)
        )
    )


@pytest.mark.parametrize("damping", [0.03, 0.1, 10.0])
@pytest.mark.parametrize("axes", ["examples", "positions"])
def test_ekfac_is_the_dense_computation(problem: Problem, axes: str, damping: float) -> None:
    module = problem.modules()[0]
    inverse = ekfac_inverse(module, problem.inputs, damping, axes=axes)
    expected = measured(problem, module, "margin") @ inverse @ negative_loss(problem, module).T / 60
    index = problem.fit(
        "ekfac", method={"type": "ekfac", "projection": SMALL, "axes": axes, "whole_layers": 0, "residual_power": 1}
    )
    assert relative_error(scores(index, problem, damping), expected) < 1e-4


def test_damping_is_a_matter_of_the_query(problem: Problem) -> None:
    """One fit answers for every damping as a fit with that default would."""
    index = problem.fit("ekfac", method={"type": "ekfac", "projection": SMALL, "damping": 0.1})
    other = problem.fit("ekfac5", method={"type": "ekfac", "projection": SMALL, "damping": 5})
    np.testing.assert_array_equal(scores(index, problem, 5.0), scores(other, problem))
    assert relative_error(scores(index, problem), scores(other, problem)) > 0.1


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal", "gauss_newton"])
def test_the_default_damping_follows_the_concentration_of_the_spectrum(problem: Problem, kind: str) -> None:
    index = problem.fit("default", method={"type": kind, "projection": SMALL})
    fitted = read_arrays(index.folder / FACTORS_FILE)
    blocks = [value.flatten() for name, value in fitted.items() if ".eigenvalues." in name]
    logarithms = sum(block.size * np.log(block.size * (block**2).sum() / block.sum() ** 2) for block in blocks)
    method = METHODS[kind].model_validate({"type": kind})
    assert isinstance(method, FisherMethod)
    expected = method.damping_for(np.exp(logarithms / sum(block.size for block in blocks)))
    assert 0.001 <= expected < method.max_default
    assert index.default_damping == pytest.approx(expected, rel=5e-3)
    np.testing.assert_array_equal(scores(index, problem), scores(index, problem, index.default_damping))


def test_the_default_damping_grows_with_concentration_up_to_a_bound() -> None:
    method = EkfacMethod(type="ekfac")
    assert method.damping_for(1e6) == 3
    assert method.damping_for(200) == pytest.approx(3 / 8)
    assert method.damping_for(1) == 0.001
    assert EkfacMethod(type="ekfac", damping=0.0).damping_for(1e6) == 0


def test_ekfac_self_influence_is_an_examples_score_for_itself(problem: Problem) -> None:
    index = problem.fit("ekfac", method={"type": "ekfac", "projection": SMALL})
    own = index.scores(index.query(index.context.source.batch(ALL), None), ALL, rescore=True).diagonal()
    assert relative_error(index.self_influence(), own) < 1e-4


def trak_scores(given: Problem, *, weighted: bool, damping: float, power: float, measurement: str = "margin") -> Tensor:
    """Park et al. 2023, equation 17, term by term, with a power of the misfits that keeps their mean."""
    task = build_task(given.spec.task)
    kernels, misfits = [], []
    for number, module in enumerate(given.modules()):
        spec = ProjectionSpec.model_validate({**SHARP})
        sketch = build_projection(spec.model_copy(update={"seed": spec.seed + (number << 32)})).matrix(57)
        phi = gradients(module, training_batch(given), task.log_odds) @ sketch
        query = measured(given, module, measurement) @ sketch
        with torch.no_grad():
            p = module(given.inputs).softmax(1).gather(1, given.targets[:, None])[:, 0]
        kernel = phi.T @ (phi * (p * (1 - p))[:, None] if weighted else phi)
        damped = kernel + damping * kernel.trace() / 64 * torch.eye(64, dtype=torch.float64)
        kernels.append(query @ torch.linalg.inv(damped) @ phi.T)
        misfits.append(tempered(1 - p, power))
    return torch.stack(kernels).mean(0) * torch.stack(misfits).mean(0)


@pytest.mark.parametrize("curvature", ["gradient", "gauss_newton"])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_trak_is_its_formula_over_an_ensemble(ensemble: Problem, curvature: str, damping: float) -> None:
    index = ensemble.fit("trak", method={"type": "trak", "projection": SHARP, "curvature": curvature})
    weighted = curvature == "gauss_newton"
    expected = trak_scores(ensemble, weighted=weighted, damping=damping, power=0.6 if weighted else 1)
    assert relative_error(scores(index, ensemble, damping), expected) < 1e-4


def test_trak_measures_what_was_asked_for(problem: Problem) -> None:
    """The published method always measures the margin; here the unit is that of the answer's output."""
    index = problem.fit("trak", method={"type": "trak", "projection": SHARP}, measurement="log_likelihood")
    expected = trak_scores(problem, weighted=True, damping=0.1, power=0.6, measurement="log_likelihood")
    assert relative_error(scores(index, problem, 0.1), expected) < 1e-4


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_trak_self_influence_is_an_examples_score_for_itself(ensemble: Problem, measurement: str) -> None:
    index = ensemble.fit("trak", method={"type": "trak", "projection": SHARP}, measurement=measurement)
    own = index.scores(index.query(index.context.source.batch(ALL), None), ALL, rescore=True).diagonal()
    # A score multiplies the mean kernel with the mean weight, and so does self-influence.
    assert relative_error(index.self_influence(), own) < 1e-4


def test_soft_threshold_shrinks_scores(problem: Problem) -> None:
    plain = scores(problem.fit("trak", method={"type": "trak", "projection": SHARP}), problem)
    threshold = float(np.median(np.abs(plain)))
    method = {"type": "trak", "projection": SHARP, "soft_threshold": threshold}
    shrunk = problem.fit("shrunk", method=method)
    expected = np.sign(plain) * np.maximum(np.abs(plain) - threshold, 0)
    np.testing.assert_allclose(scores(shrunk, problem), expected, rtol=1e-5, atol=1e-7)
    query = shrunk.query(problem.queries(), None)
    for found, row in zip(shrunk.attribute(query, 60, None, rescore=True), expected, strict=True):
        assert len(found.positive.rows) == (row > 0).sum()
        assert len(found.negative.rows) == (row < 0).sum()


def test_regression_scores(regression: Problem) -> None:
    module = regression.modules()[0]
    expected = measured(regression, module, "prediction") @ negative_loss(regression, module).T / 60
    assert relative_error(scores(regression.fit("dot"), regression), expected) < 1e-5
    kernels = [
        regression.fit(kind, method={"type": "trak", "projection": SHARP, "curvature": kind})
        for kind in ("gradient", "gauss_newton")
    ]
    np.testing.assert_array_equal(*(scores(index, regression) for index in kernels))


@pytest.mark.parametrize("method", ["ekfac", "trak"])
def test_no_damping_where_the_curvature_is_singular_is_refused(problem: Problem, method: str) -> None:
    wide = {"type": "gaussian", "dim": 128, "seed": 0}
    index = problem.fit("singular", method={"type": method, "projection": wide})
    if method == "ekfac":
        for member in index.members:
            member.curvature.eigenvalues[0].view(-1)[0] = 0
    with pytest.raises(SingularCurvatureError) as caught:
        index.query(problem.queries(), 0.0)
    assert caught.value.pointer == "/damping"
    assert np.isfinite(scores(index, problem, 1e-3)).all()


@pytest.mark.parametrize("kind", ["explicit", "arnoldi"])
def test_a_fit_whose_own_damping_is_too_small_names_its_methods(problem: Problem, kind: str) -> None:
    """The Hessian of a network that was trained briefly has negative eigenvalues."""
    with pytest.raises(SingularCurvatureError, match="larger damping") as caught:
        problem.fit("indefinite", method={"type": kind, "damping": 1e-3})
    assert caught.value.pointer == "/method/damping"


@pytest.mark.parametrize("damping", [0.03, 1.0])
def test_logra_is_the_dense_solve_of_projected_gradients(ensemble: Problem, damping: float) -> None:
    index = ensemble.fit("logra", method={"type": "logra", "projection": {"type": "factored", "dim": 40, "seed": 2}})
    expected = torch.zeros(4, 60, dtype=torch.float64)
    for module, member in zip(ensemble.modules(), index.members, strict=True):
        assert isinstance(member, Logra)
        first, second = torch.eye(57, dtype=torch.float64).split([36, 21], dim=1)  # a unit vector per parameter
        sketch = member.projection.project([first.view(57, 1, 6, 6), second.view(57, 1, 3, 7)])  # (57, dim)
        query, train = measured(ensemble, module, "margin") @ sketch, negative_loss(ensemble, module) @ sketch
        for part in member.projection.slices:
            fisher = train[:, part].T @ train[:, part] / 60
            damped = fisher + damping * fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=torch.float64)
            expected += query[:, part] @ torch.linalg.solve(damped, train[:, part].T) / 60 / len(index.members)
    assert relative_error(scores(index, ensemble, damping), expected) < 1e-5


@pytest.mark.parametrize(
    "name", ["ekfac", "kfac", "diagonal", "datainf", "gauss_newton", "explicit", "cg", "lissa", "arnoldi"]
)
def test_an_ensemble_is_the_mean_of_its_members(ensemble: Problem, name: str) -> None:
    """At one damping: a default is that of all members together."""
    method = EVERY_METHOD.get(name, {"type": name, "projection": SMALL})
    if "damping" in METHODS[name].model_fields:
        method = {"damping": 0.1, **method}
    together = scores(ensemble.fit("together", method=method), ensemble)
    alone = [
        scores(ensemble.fit("alone", method=method, checkpoints=[reference]), ensemble)
        for reference in ensemble.spec.checkpoints
    ]
    assert relative_error(together, np.mean(alone, axis=0)) < 1e-5
