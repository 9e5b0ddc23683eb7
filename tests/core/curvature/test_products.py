"""Products with curvature matrices against the matrices themselves, in float64; and the solvers on top of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

from attribution_core.architectures.build import build
from attribution_core.curvature import Identity
from attribution_core.curvature import rows as curvature_rows
from attribution_core.curvature.fisher import Fisher, observe
from attribution_core.curvature.products import HessianProducts
from attribution_core.curvature.rows import PseudoRows
from attribution_core.curvature.solvers import (
    arnoldi,
    conjugate_gradients,
    largest_eigenvalue,
    lissa,
    mean_eigenvalue,
)
from attribution_core.curvature.vectors import flattened, unflattened
from attribution_core.data.batch import Batch
from attribution_core.errors import SingularCurvatureError
from attribution_core.gradients import GradientCapture
from attribution_core.gradients.parameters import ParameterLayout
from attribution_core.spec import ArchitectureSpec, CausalLanguageModelingTask, ClassificationTask
from attribution_core.tasks import Task, build_task

Case = tuple[nn.Module, Task, Batch]


def _mlp() -> Case:
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    return module, build_task(ClassificationTask()), Batch(torch.arange(12), torch.randn(12, 4), torch.arange(12) % 3)


def _cnn() -> Case:
    module = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    inputs = torch.randn(10, 2, 3, 3)
    return module, build_task(ClassificationTask()), Batch(torch.arange(10), inputs, torch.arange(10) % 3)


def _lm() -> Case:
    arguments = {"vocab_size": 5, "width": 4, "depth": 1, "heads": 1, "max_length": 6, "mlp_width": 4}
    module = build(ArchitectureSpec(name="transformer_lm", arguments=arguments))
    task = build_task(CausalLanguageModelingTask())
    mask = torch.arange(6) < torch.tensor([6, 4, 5]).unsqueeze(1)
    return module, task, Batch(torch.arange(3), torch.randint(0, 5, (3, 6)), mask=mask)


CASES: dict[str, Callable[[], Case]] = {"mlp": _mlp, "cnn": _cnn, "lm": _lm}


def case(name: str) -> Case:
    torch.manual_seed(0)
    module, task, batch = CASES[name]()
    inputs = batch.inputs.double() if batch.inputs.is_floating_point() else batch.inputs
    return module.double().requires_grad_(False), task, Batch(batch.rows, inputs, batch.targets, batch.mask)


def dense_hessian(capture: GradientCapture, task: Task, batch: Batch, *, gauss_newton: bool) -> Tensor:
    """The mean loss's Hessian, or JᵀDJ, over block coordinates (P, P), by autograd on a flat vector.

    Entry by entry: `torch.func.hessian` gets the weights of LayerNorm wrong.
    """
    layout = ParameterLayout(capture)
    base = layout.packed({name: value.unsqueeze(0) for name, value in layout.parameters().items()})

    def output(flat: Tensor) -> Tensor:
        named = layout.unpacked(unflattened(flat.unsqueeze(0), capture.blocks))
        given = {name: value[0] for name, value in named.items()}
        options = {} if batch.mask is None else {"mask": batch.mask}
        return functional_call(capture.module, given, (batch.inputs,), options)

    flat = flattened(base)[0]
    if not gauss_newton:
        return hessian(lambda vector: task.loss(output(vector), batch).mean(), flat)
    found = output(flat)
    slopes = jacobian(output, flat).reshape(found.numel(), -1)
    bend = hessian(lambda value: task.loss(value.reshape(found.shape), batch).mean(), found.flatten())
    return slopes.T @ bend @ slopes


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_products_are_the_matrix_times_the_vector(name: str, gauss_newton: bool) -> None:
    module, task, batch = case(name)
    capture = GradientCapture(module)
    matrix = dense_hessian(capture, task, batch, gauss_newton=gauss_newton)
    products = HessianProducts(capture, task, "gauss_newton" if gauss_newton else "hessian", 0.3)
    vectors = torch.randn(5, len(matrix), dtype=torch.float64)
    parts = [batch[:2], batch[2:]]
    found = flattened(products.mean(parts, unflattened(vectors, capture.blocks)))
    torch.testing.assert_close(found, vectors @ matrix + 0.3 * vectors, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("at_once", [1, 256])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_kept_rows_multiply_by_the_gauss_newton_matrix(
    name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature_rows, "_ROWS_AT_ONCE", at_once)
    module, task, batch = case(name)
    capture = GradientCapture(module)
    matrix = dense_hessian(capture, task, batch, gauss_newton=True)
    draws = [
        Fisher("exact", 1, 0).draws(capture.run(part.forward, len(part)), task, part) for part in (batch[:4], batch[4:])
    ]
    rows = PseudoRows(draws)
    vectors = torch.randn(5, len(matrix), dtype=torch.float64)
    found = flattened(rows.product(unflattened(vectors, capture.blocks)))
    torch.testing.assert_close(found, vectors @ matrix, rtol=1e-9, atol=1e-11)
    sizes = [block.numel for block in capture.blocks]
    traces = [float(part.mean()) for part in matrix.diagonal().split(sizes)]
    assert rows.mean_eigenvalues() == pytest.approx(traces)


def test_many_sampled_tokens_approach_the_gauss_newton_matrix() -> None:
    """The scale of a mean over tokens is that of the loss's curvature, not of the squared mean gradient."""
    module, task, batch = case("lm")
    capture = GradientCapture(module)
    matrix = dense_hessian(capture, task, batch, gauss_newton=True)
    draws = Fisher("sampled", 400, 0).draws(capture.run(batch.forward, len(batch)), task, batch)
    found = flattened(PseudoRows([draws]).product(unflattened(torch.eye(len(matrix)).double(), capture.blocks)))
    assert float(found.trace() / matrix.trace()) == pytest.approx(1, abs=0.05)
    assert float((found - matrix).norm() / matrix.norm()) < 0.15


def test_the_mean_of_inverses_is_the_layerwise_dense_computation() -> None:
    module, task, batch = case("cnn")
    capture = GradientCapture(module)
    observed = observe(capture.run(batch.forward, len(batch)), task, batch, "margin", None)
    rows = PseudoRows([[[part[:6] for part in observed.training]], [[part[6:] for part in observed.training]]])
    rates = [0.1, 0.2, 0.3]
    vectors = [torch.randn(2, *block.shape, dtype=torch.float64) for block in capture.blocks]
    for number, found in enumerate(rows.layerwise(vectors, rates)):
        gradients = observed.training[number].materialise().flatten(1)
        eye = torch.eye(gradients.shape[1], dtype=torch.float64)
        inverse = torch.stack([torch.linalg.inv(rates[number] * eye + g.outer(g)) for g in gradients]).mean(0)
        torch.testing.assert_close(found.flatten(1), vectors[number].flatten(1) @ inverse)


def positive(size: int = 20, condition: float = 1e3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10(), size, dtype=torch.float64)) @ basis.T


def test_conjugate_gradients_solve_and_do_so_sooner_with_a_preconditioner() -> None:
    matrix = positive()
    vectors = torch.randn(3, 20, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, vectors.T).T
    plain = conjugate_gradients(lambda v: v @ matrix, vectors, lambda v: v, 60, 1e-12)
    torch.testing.assert_close(plain, expected, rtol=1e-8, atol=1e-8)
    scale = matrix + 1e-3 * torch.eye(20, dtype=torch.float64)
    inverse = torch.linalg.inv(scale)
    few = conjugate_gradients(lambda v: v @ matrix, vectors, lambda v: v @ inverse, 4, 1e-12)
    unaided = conjugate_gradients(lambda v: v @ matrix, vectors, lambda v: v, 4, 1e-12)
    assert (few - expected).norm() < 0.1 * (unaided - expected).norm()


def test_vectors_of_a_batch_do_not_see_each_other() -> None:
    matrix, vectors = positive(), torch.randn(3, 20, dtype=torch.float64) * torch.tensor([[1e-9], [1.0], [1e9]])
    together = conjugate_gradients(lambda v: v @ matrix, vectors, lambda v: v, 15, 1e-12)
    for vector, found in zip(vectors, together, strict=True):
        alone = conjugate_gradients(lambda v: v @ matrix, vector.unsqueeze(0), lambda v: v, 15, 1e-12)
        torch.testing.assert_close(found, alone[0], rtol=1e-6, atol=0)


def test_a_vector_that_is_solved_takes_no_part_in_the_others_steps() -> None:
    """Of an eigenvector, a sum of two and any vector, which take 1, 2 and many steps."""
    matrix, steps = positive(), []
    axes = torch.linalg.eigh(matrix)[1].T
    vectors = torch.stack([axes[0], axes[3] + axes[9], torch.randn(20, dtype=torch.float64)])

    def product(part: Tensor) -> Tensor:
        steps.append(len(part))
        return part @ matrix

    together = conjugate_gradients(product, vectors, lambda v: v, 100, 1e-6)
    assert steps[:3] == [3, 2, 1]
    assert set(steps[3:]) == {1}
    for vector, found in zip(vectors, together, strict=True):
        alone = conjugate_gradients(lambda v: v @ matrix, vector.unsqueeze(0), lambda v: v, 100, 1e-6)
        torch.testing.assert_close(found, alone[0], rtol=1e-6, atol=1e-9)
        assert (found @ matrix - vector).norm() <= 1.01e-6 * vector.norm()


def test_conjugate_gradients_refuse_negative_curvature() -> None:
    matrix = -torch.eye(4, dtype=torch.float64)
    with pytest.raises(SingularCurvatureError, match="larger damping"):
        conjugate_gradients(lambda v: v @ matrix, torch.ones(1, 4).double(), lambda v: v, 5, 1e-6)


def test_lissa_approaches_the_solution_and_says_when_it_diverges() -> None:
    matrix, vectors = positive(condition=20), torch.randn(2, 20, dtype=torch.float64)
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(20).double(), vectors.T).T
    terms = [lambda v: v @ matrix] * 300
    torch.testing.assert_close(lissa(terms, vectors, 0.1, 1.2), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(SingularCurvatureError, match="diverges"):
        lissa([lambda v: v @ matrix * 1e6] * 300, vectors, 0.1, 1.2)


def test_lissa_sees_negative_curvature_before_numbers_overflow() -> None:
    matrix, vectors = positive() - 0.2 * torch.eye(20, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    for damping, terms in ((0.19, 2000), (0.05, 100)):
        with pytest.raises(SingularCurvatureError, match="negative direction") as caught:
            lissa([lambda v: v @ matrix] * terms, vectors, damping, 1.2)
        assert caught.value.pointer == "/damping"
    assert lissa([lambda v: v @ matrix] * 100, vectors, 0.25, 1.2).isfinite().all()


def test_arnoldi_finds_the_spectrum_in_a_full_krylov_space() -> None:
    matrix = positive(12) - 0.2 * torch.eye(12, dtype=torch.float64)  # indefinite
    values, vectors = arnoldi(lambda v: v @ matrix, torch.randn(12, dtype=torch.float64), 12)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, matrix, rtol=1e-7, atol=1e-7)
    assert (values.abs().diff() <= 1e-12).all()


def test_a_small_krylov_space_has_the_leading_eigenvectors() -> None:
    matrix = torch.diag(torch.tensor([9.0, -5.0, *([0.01] * 30)]).double())
    values, _ = arnoldi(lambda v: v @ matrix, torch.randn(32, dtype=torch.float64), 8)
    torch.testing.assert_close(values[:2], torch.tensor([9.0, -5.0]).double(), rtol=1e-6, atol=1e-6)


def test_scales_of_a_matrix() -> None:
    matrix = positive(40, condition=10)
    like = torch.zeros(1, dtype=torch.float64)
    assert largest_eigenvalue(lambda v: v @ matrix, 40, like, 60) == pytest.approx(1, rel=0.02)
    mean = mean_eigenvalue(lambda v: v @ matrix, 40, like, 400)
    assert mean == pytest.approx(float(matrix.diagonal().mean()), rel=0.03)


@pytest.mark.parametrize("name", ["mlp", "cnn", "lm"])
def test_quadratic_forms_from_factors(name: str) -> None:
    module, task, batch = case(name)
    capture = GradientCapture(module)
    observed = observe(capture.run(batch.forward, len(batch)), task, batch, task.default_measurement, None)
    squares = flattened([part.materialise() for part in observed.measured]).square().sum(1)
    torch.testing.assert_close(Identity().quadratic(observed.measured, 0.1), squares)
    crossed = flattened([part.materialise() for part in observed.training])
    expected = (flattened([part.materialise() for part in observed.measured]) * crossed).sum(1)
    torch.testing.assert_close(Identity().paired(observed.measured, observed.training, 0.1), expected)


@pytest.mark.parametrize("name", CASES)
def test_layout_of_parameters_is_undone(name: str) -> None:
    module, _, _ = case(name)
    layout = ParameterLayout(GradientCapture(module))
    named = {key: torch.randn(2, *value.shape, dtype=torch.float64) for key, value in layout.parameters().items()}
    for key, value in layout.unpacked(layout.packed(named)).items():
        torch.testing.assert_close(value, named[key], rtol=0, atol=0)
