"""Which pseudo-gradients are kept, and the factorisation in their space, against dense matrices in float64."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from attribution_core.curvature import CovarianceSums, Eigenbasis, EigenvalueSums, EkfacFactors, block_rows
from attribution_core.curvature import rows as curvature_rows
from attribution_core.curvature.draws import Draws
from attribution_core.curvature.fisher import Fisher
from attribution_core.curvature.iterative import GaussNewton
from attribution_core.curvature.row_factor import RowFactor
from attribution_core.curvature.rows import PseudoRows
from attribution_core.curvature.selection import Frame, Selection
from attribution_core.curvature.vectors import flattened, unflattened
from attribution_core.gradients import GradientCapture, LayerGradient
from tests.core.curvature.test_products import CASES, case


def drawn(name: str, *cuts: int) -> list[Draws]:
    """Draws of a model's training batch, cut at some examples."""
    module, task, batch = case(name)
    capture = GradientCapture(module)
    fisher = Fisher("sampled", 3, 0) if name == "lm" else Fisher("exact", 1, 0)
    ends = [0, *cuts, len(batch)]
    parts = [batch[start:stop] for start, stop in pairwise(ends)]
    return [fisher.draws(capture.run(part.forward, len(part)), task, part) for part in parts]


def factors_of(draws: list[Draws]) -> EkfacFactors:
    blocks, n = [part.block for part in draws[0][0]], sum(len(part[0][0]) for part in draws)
    sums = CovarianceSums(blocks)
    for part in draws:
        sums.add(part)
    values = EigenvalueSums(Eigenbasis(blocks, arrays := Eigenbasis.solve(sums.arrays())))
    for part in draws:
        values.add(part)
    return EkfacFactors.from_arrays(blocks, arrays | {name: value / n for name, value in values.arrays().items()})


def matrix_of(rows: PseudoRows) -> Tensor:
    """`H̄` over block coordinates, from products with unit vectors."""
    size = sum(block.numel for block in rows.blocks)
    return flattened(rows.product(unflattened(torch.eye(size, dtype=torch.float64), rows.blocks)))


def turned(rows: Tensor, factors: EkfacFactors) -> Tensor:
    """Rotate flat rows into the eigenbasis."""
    parts = unflattened(rows, factors.basis.blocks)
    return flattened([turn.forward(part) for part, turn in zip(parts, factors.basis.rotations, strict=True)])


def dense_rows(draws: list[Draws]) -> Tensor:
    """All pseudo-gradients, (n, draws, P)."""
    batches = [torch.stack([flattened([g.materialise() for g in draw]) for draw in part], 1) for part in draws]
    return torch.cat(batches)


@pytest.mark.parametrize("name", CASES)
def test_turned_rows_have_the_second_moment_of_the_draws(name: str) -> None:
    draws = drawn(name, 2)
    factors, given = factors_of(draws), dense_rows(draws)
    found = PseudoRows(draws, frame=Frame.of(factors))
    flat = turned(given.flatten(0, 1), factors)
    torch.testing.assert_close(matrix_of(found), flat.T @ flat / len(given), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("negligible", [0.3, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_out_is_the_least_and_bounded(name: str, negligible: float) -> None:
    """Against the singular values of each example's draws, layers weighted by their traces."""
    draws = drawn(name, 2)
    factors, given = factors_of(draws), dense_rows(draws)
    n, count, _ = given.shape
    sizes = [block.numel for block in factors.basis.blocks]
    traces = [float(part.square().sum()) / n for part in given.split(sizes, dim=2)]
    weights = torch.cat([torch.full((size,), (len(sizes) * t) ** -0.5) for size, t in zip(sizes, traces, strict=True)])
    shares = torch.linalg.svdvals(given * weights.double()).square() * count
    found = PseudoRows(draws, frame=Frame.of(factors, negligible))
    assert 0 < len(found) == int((shares >= negligible).sum()) < shares.numel()
    kept, whole = matrix_of(found), turned(given.flatten(0, 1), factors)
    whole = whole.T @ whole / n
    assert float(torch.linalg.eigvalsh(whole - kept).min()) > -1e-8 * float(whole.trace())
    parts = zip(kept.diagonal().split(sizes), whole.diagonal().split(sizes), strict=True)
    lost = torch.stack([1 - own.sum() / all_.sum() for own, all_ in parts]).mean()
    assert float(lost) == pytest.approx(float(shares[shares < negligible].sum() / shares.sum()), rel=1e-4, abs=1e-6)
    assert float(lost) < negligible
    rest = flattened([part.unsqueeze(0) for part in found.left_out(factors.eigenvalues)])[0]
    torch.testing.assert_close(kept.diagonal() + rest, whole.diagonal(), rtol=1e-5, atol=1e-7)
    group = np.arange(1, n, 2)
    left = found.without(group, n)
    torch.testing.assert_close(
        left.diagonals,
        [
            part.diagonal().view(block.shape)
            for part, block in zip(_blocks(matrix_of(left), sizes), left.blocks, strict=True)
        ],
    )


@pytest.mark.parametrize("name", CASES)
def test_chosen_rows_are_found_again_whatever_the_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = factors_of(drawn(name))
    chosen = PseudoRows(drawn(name), frame=(frame := Frame.of(factors, 0.9)))
    selection = Selection.from_arrays(chosen.selection.arrays())
    monkeypatch.setattr(curvature_rows, "_ROWS_AT_ONCE", 1)
    monkeypatch.setattr(block_rows, "NUMBERS_AT_ONCE", 1)
    monkeypatch.setattr(curvature_rows, "_WHOLE_AT_ONCE", 1)
    again = PseudoRows(
        [[[part[place : place + 1] for part in draw] for draw in drawn(name)[0]] for place in selection.used],
        frame=frame,
        selection=selection,
    )
    assert again.num_examples == chosen.num_examples == len(drawn(name)[0][0][0])
    torch.testing.assert_close(matrix_of(again), matrix_of(chosen), rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(curvature_rows, "_MOST_PARAMETERS", 0)
    plain = PseudoRows(drawn(name), frame=frame)
    torch.testing.assert_close(matrix_of(plain), matrix_of(chosen), rtol=1e-9, atol=1e-12)
    divisors = [torch.rand(block.shape, dtype=torch.float64) + 0.1 for block in chosen.blocks]
    torch.testing.assert_close(again.gram(divisors).tril(), chosen.gram(divisors).tril(), rtol=1e-9, atol=1e-12)


def test_a_factorisation_is_made_only_of_few_rows_and_positive_diagonals(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = drawn("cnn")
    factors = factors_of(draws)
    rows = PseudoRows(draws, frame=Frame.of(factors))
    curvature = GaussNewton(lambda: rows, factors, 10, 1e-2, 0.0)
    assert curvature.factorised(0.1) is not None
    assert curvature.factorised(0.0) is None
    monkeypatch.setattr("attribution_core.curvature.row_factor.MAX_ROWS", len(rows) - 1)
    assert curvature.factorised(0.1) is None
    monkeypatch.undo()
    monkeypatch.setattr("attribution_core.curvature.row_factor.MAX_WORK", 1)
    assert curvature.factorised(0.1) is None
    monkeypatch.undo()
    many = PseudoRows(drawn("mlp"), frame=Frame.of(few := factors_of(drawn("mlp"))))
    assert len(many) > sum(block.numel for block in many.blocks)
    assert GaussNewton(lambda: many, few, 10, 1e-2, 0.0).factorised(0.1) is None
    assert RowFactor.from_arrays({}) is None


def test_a_factorisation_answers_at_its_own_damping_alone() -> None:
    """At another, and without a group, conjugate gradients do; of none of their steps nothing would be left."""
    draws = drawn("cnn")
    factors = factors_of(draws)
    rows = PseudoRows(draws, frame=Frame.of(factors))
    unsolved = GaussNewton(lambda: rows, factors, 0, 1e-2, 0.5)
    curvature = GaussNewton(lambda: rows, factors, 0, 1e-2, 0.5, unsolved.factorised(0.1))
    vectors = [torch.randn(2, *block.shape, dtype=torch.float64) for block in rows.blocks]
    assert all(bool(part.any()) for part in curvature.solve(vectors, 0.1))
    assert not any(bool(part.any()) for part in curvature.solve(vectors, 0.2))
    assert not any(bool(part.any()) for part in curvature.penalised(0.1).solve(vectors, 0.1))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_solves_are_linear_whatever_the_size_of_a_vector(scale: float) -> None:
    draws = drawn("cnn")
    factors = factors_of(draws)
    rows = PseudoRows([[[_single(part) for part in draw] for draw in draws[0]]], frame=Frame.of(factors, 0.3))
    unsolved = GaussNewton(lambda: rows, factors, 50, 1e-6, 0.5)
    curvature = GaussNewton(lambda: rows, factors, 50, 1e-6, 0.5, unsolved.factorised(0.1))
    vectors = [torch.randn(2, *block.shape) for block in rows.blocks]
    for damping in (0.1, 0.2):
        expected = curvature.solve(vectors, damping)
        found = curvature.solve([part * scale for part in vectors], damping)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one / scale, other, rtol=1e-4, atol=1e-5)
    zero = curvature.solve([torch.zeros_like(part) for part in vectors], 0.1)
    assert not any(bool(part.any()) for part in zero)
    assert np.isfinite(rows.nbytes)


def _blocks(matrix: Tensor, sizes: list[int]) -> list[Tensor]:
    return [row.split(sizes, dim=1)[number] for number, row in enumerate(matrix.split(sizes))]


def _single(gradient: LayerGradient) -> LayerGradient:
    return replace(gradient, inputs=gradient.inputs.float(), outputs=gradient.outputs.float())
