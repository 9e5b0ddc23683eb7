"""EK-FAC against the exact dense computation on tiny networks, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attribution_core.curvature import CovarianceSums, Eigenbasis, EigenvalueSums, EkfacFactors, covariances
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.ekfac import concentration, kronecker_eigenvalues
from attribution_core.errors import SingularCurvatureError
from attribution_core.gradients import GradientCapture, Rotation

NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), lambda: torch.randn(30, 4)),
    "grouped conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        lambda: torch.randn(30, 2, 3, 3),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(12, 3)),
        lambda: torch.randint(0, 5, (30, 4)),
    ),
}


def pseudo_losses(output: Tensor) -> list[Tensor]:
    log_probabilities = output.log_softmax(1)
    weights = log_probabilities.exp().sqrt().detach()
    return [-weights[:, label] * log_probabilities[:, label] for label in range(output.shape[1])]


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network, inputs = NETWORKS[name]
    values = inputs()
    return network().double(), values.double() if values.is_floating_point() else values


def fitted(name: str, chunks: int = 1) -> tuple[GradientCapture, EkfacFactors]:
    network, inputs = prepared(name)
    capture = GradientCapture(network)
    covariance = CovarianceSums(capture.blocks)
    for chunk in inputs.chunk(chunks):
        run = capture.run(lambda module, chunk=chunk: module(chunk))
        covariance.add(Draws([run.gradients(loss, keep=True) for loss in pseudo_losses(run.output)]))
    vectors = {k: torch.from_numpy(v).double().numpy() for k, v in Eigenbasis.solve(covariance.arrays()).items()}
    eigenvalues = EigenvalueSums(Eigenbasis(capture.blocks, vectors))
    for chunk in inputs.chunk(chunks):
        run = capture.run(lambda module, chunk=chunk: module(chunk))
        eigenvalues.add(Draws([run.gradients(loss, keep=True) for loss in pseudo_losses(run.output)]))
    sums = {name: value / len(inputs) for name, value in eigenvalues.arrays().items()}
    return capture, EkfacFactors.from_arrays(capture.blocks, {**vectors, **sums})


def exact_fisher(name: str) -> list[Tensor]:
    """Per block, the mean over examples of Σ_c p_c g g^T over the block's parameters (P, P), by explicit gradients."""
    network, inputs = prepared(name)
    capture = GradientCapture(network)
    totals = [torch.zeros(block.numel, block.numel, dtype=torch.float64) for block in capture.blocks]
    run = capture.run(lambda module: module(inputs))
    for loss in pseudo_losses(run.output):
        for total, gradient in zip(totals, run.gradients(loss, keep=True), strict=True):
            rows = gradient.materialise().flatten(1)
            total.add_(rows.T @ rows / len(inputs))
    return totals


def dense_basis(factors: EkfacFactors, number: int) -> Tensor:
    """The eigenvectors of one block as columns of a (P, P) matrix, built with kron per group."""
    block = factors.basis.blocks[number]
    parts = []
    for group in range(block.groups):
        rotation = factors.basis.rotations[number]
        outputs, inputs = rotation.outputs, rotation.inputs
        q_out = torch.eye(block.d_out, dtype=torch.float64) if outputs is None else outputs[group]
        q_in = torch.eye(block.d_in, dtype=torch.float64) if inputs is None else inputs[group]
        parts.append(torch.kron(q_out.contiguous(), q_in.contiguous()))
    return torch.block_diag(*parts)


@pytest.mark.parametrize("name", NETWORKS)
def test_eigenvalues_are_the_exact_fisher_in_the_eigenbasis(name: str) -> None:
    _, factors = fitted(name)
    for number, fisher in enumerate(exact_fisher(name)):
        basis = dense_basis(factors, number)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            (basis.T @ fisher @ basis).diagonal(), factors.eigenvalues[number].flatten(), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_solve_is_the_dense_inverse(name: str, damping: float) -> None:
    capture, factors = fitted(name)
    vectors = [torch.randn(2, *block.shape, dtype=torch.float64) for block in capture.blocks]
    for number, (vector, solved) in enumerate(zip(vectors, factors.solve(vectors, damping), strict=True)):
        basis, eigenvalues = dense_basis(factors, number), factors.eigenvalues[number].flatten()
        dense = basis @ torch.diag(1 / (eigenvalues + damping * eigenvalues.mean())) @ basis.T
        torch.testing.assert_close(solved.flatten(1), vector.flatten(1) @ dense.T, rtol=1e-6, atol=1e-6)


def test_exact_where_the_factors_are_independent() -> None:
    """For inputs and pseudo-gradients that are independent, K-FAC and hence EK-FAC are the Fisher itself."""
    torch.manual_seed(0)
    inputs, gradients = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    capture = GradientCapture(nn.Linear(3, 2, bias=False).double())
    run = capture.run(lambda module: module(inputs))
    covariance, fisher = CovarianceSums(capture.blocks), torch.zeros(6, 6, dtype=torch.float64)
    draws = [run.gradients(run.output @ gradient, keep=True) for gradient in gradients]
    covariance.add(Draws(draws))
    for draw in draws:
        rows = draw[0].materialise().flatten(1)
        fisher += rows.T @ rows / 6
    basis = Eigenbasis(capture.blocks, Eigenbasis.solve(covariance.arrays()))
    eigenvalues = EigenvalueSums(basis)
    eigenvalues.add(Draws(draws))
    factors = EkfacFactors(basis, [eigenvalues.values[0] / 6])
    vector = torch.randn(1, 1, 2, 3, dtype=torch.float64)
    damped = fisher + 0.1 * factors.eigenvalues[0].mean() * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(damped, vector.flatten())
    torch.testing.assert_close(factors.solve([vector], 0.1)[0].flatten(), expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_basis_gives_something_else() -> None:
    """The check above has teeth: other orthogonal vectors do not reproduce the Fisher's inverse."""
    capture, factors = fitted("mlp")
    vectors = [torch.randn(1, *block.shape, dtype=torch.float64) for block in capture.blocks]
    right = factors.solve(vectors, 0.1)
    factors.basis.rotations = [
        Rotation(rotation.inputs.mT.contiguous(), rotation.outputs) for rotation in factors.basis.rotations
    ]
    assert not torch.allclose(factors.solve(vectors, 0.1)[0], right[0], rtol=1e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_batches_do_not_change_the_factors(name: str) -> None:
    _, whole = fitted(name)
    _, parts = fitted(name, chunks=7)
    for one, other in zip(whole.eigenvalues, parts.eigenvalues, strict=True):
        torch.testing.assert_close(one.sum(), other.sum(), rtol=1e-12, atol=0)
    capture, _ = fitted(name)
    vectors = [torch.randn(1, *block.shape, dtype=torch.float64) for block in capture.blocks]
    for one, other in zip(whole.solve(vectors, 0.1), parts.solve(vectors, 0.1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_layer_without_any_gradient_takes_no_part() -> None:
    capture, factors = fitted("mlp")
    dead = EkfacFactors(factors.basis, [torch.zeros_like(factors.eigenvalues[0]), *factors.eigenvalues[1:]])
    vectors = [torch.randn(1, *block.shape, dtype=torch.float64) for block in capture.blocks]
    vectors[0].zero_()
    solved, without = dead.solve(vectors, 0.1), factors.solve(vectors, 0.1)
    for one, other in zip(solved, without, strict=True):
        torch.testing.assert_close(one, other)
    assert dead.rates(0.1)[1:] == factors.rates(0.1)[1:]


def test_singular_curvature_needs_damping() -> None:
    capture, factors = fitted("mlp")
    dead = EkfacFactors(factors.basis, [torch.zeros_like(value) for value in factors.eigenvalues])
    with pytest.raises(SingularCurvatureError, match="damping above 0"):
        dead.solve([torch.ones(1, *block.shape, dtype=torch.float64) for block in capture.blocks], 0.0)


def test_equal_sums_give_equal_bytes() -> None:
    sums = {"inputs.0": np.cov(np.random.default_rng(0).normal(size=(6, 50)))[None], "positions": np.ones(1)}
    first, second = (
        Eigenbasis.solve(sums)["inputs.0"],
        Eigenbasis.solve({**sums, "inputs.0": sums["inputs.0"].copy()})["inputs.0"],
    )
    assert first.tobytes() == second.tobytes()
    assert (np.take_along_axis(first, np.abs(first).argmax(-2)[:, None], -2) > 0).all()


class Lookup(nn.Module):
    """A pooled embedding, whose rows are a side that is never rotated, before linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.wide, self.head = nn.Embedding(40, 6), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.wide(self.embed(tokens).mean(1)).tanh())


def kfac_traces(network: nn.Module, inputs: Tensor) -> tuple[list[float], Draws]:
    capture = GradientCapture(network.double())
    run = capture.run(lambda module: module(inputs), len(inputs))
    draws = Draws([run.gradients(loss, keep=True) for loss in pseudo_losses(run.output)])
    sums = CovarianceSums(capture.blocks, for_kfac=True)
    sums.add(draws)
    eigenvalues = kronecker_eigenvalues(capture.blocks, Eigenbasis.solve(sums.arrays()), len(inputs))
    return [float(eigenvalues[f"eigenvalues.{number}"].sum()) for number in range(3)], draws


@pytest.mark.parametrize("tokens", [1, 5])
def test_kfac_has_the_trace_of_its_factors_whatever_is_rotated(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, inputs, found = Lookup(), torch.randint(0, 40, (50, tokens)), []
    for largest in (4096, 8):
        monkeypatch.setattr(covariances, "MAX_ROTATED_DIM", largest)
        traces, draws = kfac_traces(network, inputs)
        found.append(traces)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    # The factors of a lookup are independent, and no token's rows add up where each text has one.
    embedding = sum(float(draw[0].inputs.square().sum()) for draw in draws) / 50
    assert found[0][0] == pytest.approx(embedding, rel=1e-5)


def test_kfac_of_a_lookup_that_nothing_depends_on_is_zero() -> None:
    torch.manual_seed(0)
    network = Lookup()
    nn.init.zeros_(network.wide.weight)
    traces, _ = kfac_traces(network, torch.randint(0, 40, (50, 2)))
    assert traces[0] == 0 < traces[1]


def test_concentration_counts_eigenvalues_for_each_that_matters() -> None:
    equal, one = np.full((2, 3, 4), 0.5, np.float32), np.zeros(6, np.float32)
    one[2] = 7
    assert concentration([equal]) == pytest.approx(1)
    assert concentration([one]) == pytest.approx(6)
    assert concentration([equal, one]) == pytest.approx(6 ** (6 / 30))
    assert concentration([one, np.zeros(100, np.float32)]) == pytest.approx(6)
    assert concentration([np.zeros(3, np.float32)]) == 1
    assert concentration([np.float32([3e30, 1e-30])]) == pytest.approx(2)
