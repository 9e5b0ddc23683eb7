"""Every curvature on awkward models, from gradients by a loop of autograd to scores, against dense matrices in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from attribution_core.curvature import CovarianceSums, Curvature, Eigenbasis, EigenvalueSums, EkfacFactors, Identity
from attribution_core.curvature.dense import Spectral, spectrum, summed_hessian
from attribution_core.curvature.ekfac import kronecker_eigenvalues
from attribution_core.curvature.fisher import Fisher
from attribution_core.curvature.iterative import ConjugateGradient, DataInf, GaussNewton
from attribution_core.curvature.products import HessianProducts
from attribution_core.curvature.row_factor import RowFactor
from attribution_core.curvature.rows import PseudoRows
from attribution_core.curvature.selection import Frame
from attribution_core.curvature.vectors import flattened
from attribution_core.data.batch import Batch
from attribution_core.gradients import GradientCapture
from attribution_core.gradients.parameters import ParameterLayout
from attribution_core.methods.base import Checkpoint, GradientMethod
from tests.core.curvature.test_products import CASES, case, dense_hessian

DAMPING = 0.3
Losses = Callable[[Tensor, Batch], Tensor]


@dataclass
class Dense:
    """A model, its training batch, and what a loop over examples and objectives gives."""

    checkpoint: Checkpoint
    batch: Batch
    fisher: Fisher
    measured: Tensor
    training: Tensor
    draws: Tensor
    empirical: Tensor

    @property
    def parts(self) -> list[Batch]:
        return [self.batch[:2], self.batch[2:]]

    @property
    def sizes(self) -> list[int]:
        return [block.numel for block in self.checkpoint.capture.blocks]

    def drawn(self, fisher: Fisher) -> list:
        checkpoint = self.checkpoint
        return [fisher.draws(checkpoint.run(part), checkpoint.task, part) for part in self.parts]

    def scores(self, curvature: Curvature) -> Tensor:
        """Through the method: queries are the training examples themselves."""
        method = GradientMethod(self.checkpoint, curvature, DAMPING, None)
        query = method.precondition(method.encode_query(self.batch), DAMPING)
        return torch.cat([method.exact_scores(query, part) for part in self.parts], dim=1)

    def expected(self, inverse: Tensor) -> Tensor:
        return self.measured @ inverse @ self.training.T / len(self.batch)

    def rates(self, matrix: Tensor) -> Tensor:
        """Each layer's λ: a multiple of its mean eigenvalue, (P,)."""
        means = [float(part.mean()) for part in matrix.diagonal().split(self.sizes)]
        rates = [
            torch.full((size,), DAMPING * mean, dtype=torch.float64)
            for size, mean in zip(self.sizes, means, strict=True)
        ]
        return torch.cat(rates)


def by_loop(checkpoint: Checkpoint, batch: Batch, objective: Losses) -> Tensor:
    """Gradients of each example alone, in block coordinates, (batch, P)."""
    layout = ParameterLayout(checkpoint.capture)
    rows = []
    for number in range(len(batch)):
        one = batch[number : number + 1]
        named = {name: value.clone().requires_grad_() for name, value in layout.parameters().items()}
        options = {} if one.mask is None else {"mask": one.mask}
        output = torch.func.functional_call(checkpoint.module, named, (one.inputs,), options)
        found = torch.autograd.grad(objective(output, one).sum(), list(named.values()), materialize_grads=True)
        rows.append(flattened(layout.packed({name: g.unsqueeze(0) for name, g in zip(named, found, strict=True)})))
    return torch.cat(rows)


@pytest.fixture(scope="module", params=CASES)
def dense(request: pytest.FixtureRequest) -> Dense:
    module, task, batch = case(request.param)
    checkpoint = Checkpoint(module, task, task.default_measurement, len(batch), GradientCapture(module))
    kind, samples = ("sampled", 3) if request.param == "lm" else ("exact", 1)

    def pseudo(kind: str, number: int) -> Losses:
        def objective(output: Tensor, one: Batch) -> Tensor:
            return list(task.pseudo_losses(output, one, kind, 0, samples))[number]  # type: ignore[arg-type]

        return objective

    draws = torch.stack([by_loop(checkpoint, batch, pseudo(kind, number)) for number in range(3)], dim=1)
    return Dense(
        checkpoint,
        batch,
        Fisher(kind, samples, 0),
        by_loop(checkpoint, batch, lambda output, one: task.measure(output, one, task.default_measurement)),
        -by_loop(checkpoint, batch, task.loss),
        draws,
        by_loop(checkpoint, batch, pseudo("empirical", 0)),
    )


def fisher_matrix(dense: Dense) -> Tensor:
    return torch.einsum("ncp,ncq->pq", dense.draws, dense.draws) / len(dense.batch)


def eigenbasis(dense: Dense) -> dict[str, np.ndarray]:
    sums = CovarianceSums(dense.checkpoint.capture.blocks, for_kfac=True)
    for draws in dense.drawn(dense.fisher):
        sums.add(draws)
    return Eigenbasis.solve(sums.arrays())


def fitted(dense: Dense, kind: str) -> EkfacFactors:
    blocks, arrays = dense.checkpoint.capture.blocks, {} if kind == "diagonal" else eigenbasis(dense)
    if kind == "kfac":
        return EkfacFactors.from_arrays(blocks, arrays | kronecker_eigenvalues(blocks, arrays, len(dense.batch)))
    values = EigenvalueSums(Eigenbasis(blocks, arrays))
    for draws in dense.drawn(dense.fisher):
        values.add(draws)
    scaled = {name: value / len(dense.batch) for name, value in values.arrays().items()}
    return EkfacFactors.from_arrays(blocks, arrays | scaled)


def test_identity(dense: Dense) -> None:
    expected = dense.expected(torch.eye(sum(dense.sizes)).double())
    torch.testing.assert_close(dense.scores(Identity()), expected, rtol=1e-9, atol=1e-12)


def test_diagonal(dense: Dense) -> None:
    matrix = fisher_matrix(dense)
    expected = dense.expected(torch.diag(1 / (matrix.diagonal() + dense.rates(matrix))))
    torch.testing.assert_close(dense.scores(fitted(dense, "diagonal")), expected, rtol=1e-8, atol=1e-10)


def rotated(dense: Dense, factors: EkfacFactors) -> list[Tensor]:
    """Each layer's orthogonal basis as one matrix (numel, numel), written out from its two sides."""
    found = []
    for block, rotation in zip(factors.basis.blocks, factors.basis.rotations, strict=True):
        groups = []
        for group in range(block.groups):
            sides = [
                torch.eye(size).double() if side is None else side[group].double()
                for side, size in ((rotation.outputs, block.d_out), (rotation.inputs, block.d_in))
            ]
            groups.append(torch.kron(*(side.contiguous() for side in sides)))
        found.append(torch.block_diag(*groups))
    return found


def test_ekfac_is_the_fisher_matrixs_diagonal_in_its_basis(dense: Dense) -> None:
    matrix, factors = fisher_matrix(dense), fitted(dense, "ekfac")
    basis = torch.block_diag(*rotated(dense, factors))
    torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)).double(), rtol=1e-5, atol=1e-5)
    turned = basis.T @ matrix @ basis
    expected = dense.expected(basis @ torch.diag(1 / (turned.diagonal() + dense.rates(turned))) @ basis.T)
    torch.testing.assert_close(dense.scores(factors), expected, rtol=1e-5, atol=1e-7)


def test_kfac_is_exact_where_the_factors_are_independent() -> None:
    """One input for all examples: `A` is a constant, and the Fisher matrix the Kronecker product itself."""
    module, task, batch = case("mlp")
    first = Batch(batch.rows, batch.inputs[:1].expand_as(batch.inputs).clone(), batch.targets)
    checkpoint = Checkpoint(module, task, task.default_measurement, len(first), GradientCapture(module))
    draws = [
        by_loop(checkpoint, first, lambda output, one, n=n: list(task.pseudo_losses(output, one, "exact", 0, 1))[n])
        for n in range(3)
    ]
    training = -by_loop(checkpoint, first, task.loss)
    measured = by_loop(checkpoint, first, lambda output, one: task.measure(output, one, "margin"))
    given = Dense(checkpoint, first, Fisher("exact", 1, 0), measured, training, torch.stack(draws, 1), training)
    matrix = fisher_matrix(given)
    blocks = [matrix[a : a + size, a : a + size] for size, a in zip(given.sizes, (0, given.sizes[0]), strict=True)]
    whole = torch.block_diag(*blocks)
    expected = given.expected(torch.linalg.inv(whole + torch.diag(given.rates(whole))))
    torch.testing.assert_close(given.scores(fitted(given, "kfac")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shrinkage", "penalty", "factorised"),
    [(0.0, 0.0, False), (0.7, 0.0, False), (0.0, 0.2, False), (0.7, 0.2, False), (0.0, 0.0, True), (0.7, 0.0, True)],
)
def test_gauss_newton_shrunk_towards_ekfac(dense: Dense, shrinkage: float, penalty: float, factorised: bool) -> None:
    matrix, factors = fisher_matrix(dense), fitted(dense, "ekfac")
    basis = torch.block_diag(*rotated(dense, factors))
    ekfac = basis @ torch.diag((basis.T @ matrix @ basis).diagonal()) @ basis.T
    mixed = (1 - shrinkage) * matrix + shrinkage * ekfac
    inverse = torch.linalg.inv(mixed + torch.diag(dense.rates(matrix) + penalty))
    # Of an example's draws at least one tells nothing that the others do not: rows are then fewer than parameters.
    rows = PseudoRows(dense.drawn(dense.fisher), frame=Frame.of(factors, 1e-9 if factorised else 0.0))
    iterations = 0 if factorised else 500
    curvature = GaussNewton(lambda: rows, factors, iterations, 1e-10, shrinkage)
    if factorised:
        factor = curvature.factorised(DAMPING)
        stored = RowFactor.from_arrays(factor.arrays() if factor else {})
        curvature = GaussNewton(lambda: rows, factors, iterations, 1e-10, shrinkage, stored)
    elif penalty:
        curvature = curvature.penalised(penalty)
    torch.testing.assert_close(dense.scores(curvature), dense.expected(inverse), rtol=1e-5, atol=1e-6)


def test_what_gauss_newton_leaves_to_ekfac_has_the_penalty_too(dense: Dense) -> None:
    matrix, factors = fisher_matrix(dense), fitted(dense, "ekfac")
    basis = torch.block_diag(*rotated(dense, factors))
    eigenvalues = (basis.T @ matrix @ basis).diagonal() + 0.2
    inverse = torch.linalg.inv(basis @ torch.diag(eigenvalues) @ basis.T + torch.diag(dense.rates(matrix)))
    draws = dense.drawn(dense.fisher)
    curvature = GaussNewton(lambda: PseudoRows(draws), factors, 500, 1e-10, 0.7).penalised(0.2)
    gradients = draws[0][0]
    vectors = flattened([gradient.materialise() for gradient in gradients])
    expected = torch.einsum("np,pq,nq->n", vectors, inverse, vectors)
    torch.testing.assert_close(curvature.quadratic(gradients, DAMPING), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(curvature.paired(gradients, gradients, DAMPING), expected, rtol=1e-5, atol=1e-6)


def test_datainf(dense: Dense) -> None:
    layers = []
    for part in dense.empirical.split(dense.sizes, dim=1):
        rate = DAMPING * part.square().mean()
        eye = torch.eye(part.shape[1]).double()
        layers.append(torch.stack([torch.linalg.inv(rate * eye + row.outer(row)) for row in part]).mean(0))
    rows = PseudoRows(dense.drawn(Fisher("empirical", 1, 0)))
    expected = dense.expected(torch.block_diag(*layers))
    torch.testing.assert_close(dense.scores(DataInf(lambda: rows)), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_explicit_and_conjugate_gradients(dense: Dense, gauss_newton: bool) -> None:
    """With an L2 penalty that makes even the Hessian positive definite."""
    capture, task = dense.checkpoint.capture, dense.checkpoint.task
    products = HessianProducts(capture, task, "gauss_newton" if gauss_newton else "hessian", 2.0)
    matrix = dense_hessian(capture, task, dense.batch, gauss_newton=gauss_newton)
    penalised = matrix + 2.0 * torch.eye(len(matrix)).double()
    mean = float(torch.linalg.eigvalsh(penalised).abs().mean())
    expected = dense.expected(torch.linalg.inv(penalised + DAMPING * mean * torch.eye(len(matrix)).double()))
    found = summed_hessian(products, dense.parts, capture.blocks) / len(dense.batch) + 2.0 * np.eye(len(matrix))
    spectral = Spectral.from_arrays(capture.blocks, spectrum(found), "cpu")
    torch.testing.assert_close(dense.scores(spectral), expected, rtol=1e-8, atol=1e-10)
    iterative = ConjugateGradient(products, lambda: dense.parts, capture.blocks, 200, 1e-12)
    iterative.__dict__["_mean_eigenvalue"] = mean  # estimated otherwise
    torch.testing.assert_close(dense.scores(iterative), expected, rtol=1e-7, atol=1e-9)
