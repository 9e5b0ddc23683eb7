"""Layers with their whole Fisher matrix: against dense matrices of autograd's gradients, and beside Kronecker-factored layers.

`F = mean Σ_y p_y ∇log p_y ∇log p_yᵀ` of one layer, and nothing between layers, as every number of these networks can be formed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.curvature import CovarianceSums
from attribution_core.curvature.whitening import Whitening
from attribution_core.gradients import WholeRotation
from attribution_core.methods import sums
from attribution_core.methods.artifact import FACTORS_FILE
from attribution_core.methods.fit import FitPipeline
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress
from tests.core.methods import problems
from tests.core.methods.problems import SMALL, Problem, relative_error
from tests.core.methods.test_newton import GROUP, draws_of
from tests.core.methods.test_scores import ALL, measured, negative_loss, scores

EKFAC: dict[str, Any] = {"type": "ekfac", "projection": SMALL, "damping": 0.1, "residual_power": 1}
SOLVED: dict[str, Any] = {**EKFAC, "type": "gauss_newton", "negligible": 0, "iterations": 200, "tolerance": 1e-7}
LAYERS = (36, 21)  # parameters, in the order of their blocks


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return problems.classification(tmp_path_factory.mktemp("whole"))


def fisher(index: LoadedIndex, staying: np.ndarray | None = None) -> Tensor:
    """Every layer's Fisher matrix of all or some examples, divided by n, on the diagonal of (P, P) float64."""
    draws = draws_of(index, np.arange(60) if staying is None else staying)
    matrix = torch.einsum("ncp,ncq->pq", draws, draws) / 60
    return torch.block_diag(*(matrix[part, part] for part in _slices()))


def rates(index: LoadedIndex, damping: float) -> Tensor:
    """Every layer's λ on the diagonal of (P, P) float64."""
    means = [fisher(index).diagonal()[part].mean() for part in _slices()]
    return torch.diag(damping * torch.stack(means).repeat_interleave(torch.tensor(LAYERS)))


def _slices() -> list[slice]:
    return [slice(0, LAYERS[0]), slice(LAYERS[0], sum(LAYERS))]


def whole(index: LoadedIndex) -> list[bool]:
    rotations = index.members[0].curvature.basis.rotations  # type: ignore[attr-defined]
    return [isinstance(rotation, WholeRotation) for rotation in rotations]


@pytest.mark.parametrize("layout", ["vectors", "factors"])
@pytest.mark.parametrize("damping", [0.03, 1.0])
def test_scores_are_those_of_each_layers_fisher_matrix(problem: Problem, damping: float, layout: str) -> None:
    index, module = problem.fit("index", method=EKFAC, store={"layout": layout}), problem.modules()[0]
    inverse = torch.linalg.inv(fisher(index) + rates(index, damping))
    expected = measured(problem, module, "margin") @ inverse @ negative_loss(problem, module).T / 60
    assert whole(index) == [True, True]
    assert relative_error(scores(index, problem, damping), expected) < 1e-4
    kronecker = problem.fit("sides", method={**EKFAC, "whole_layers": 0})
    assert relative_error(scores(kronecker, problem, damping), expected) > 0.05


def test_self_influence_is_an_examples_score_for_itself(problem: Problem) -> None:
    index = problem.fit("index", method=EKFAC)
    own = index.scores(index.query(index.context.source.batch(ALL), None), ALL, rescore=True).diagonal()
    assert relative_error(index.self_influence(), own) < 1e-4


@pytest.mark.parametrize(("limit", "expected"), [(36, [True, True]), (35, [False, True]), (20, [False, False])])
def test_layers_of_more_parameters_keep_their_sides(problem: Problem, limit: int, expected: list[bool]) -> None:
    assert whole(problem.fit("limit", method={**EKFAC, "whole_layers": limit})) == expected


def test_layers_of_more_parameters_than_examples_keep_their_sides(problem: Problem) -> None:
    """35 examples span no more than a part of the first layer's 36 directions."""
    assert whole(problem.fit("few", method=EKFAC, left_out=list(range(35, 60)))) == [False, True]
    assert whole(problem.fit("enough", method=EKFAC, left_out=list(range(36, 60)))) == [True, True]


def test_without_a_group_every_eigenvalue_loses_its_share(problem: Problem) -> None:
    index, module = problem.fit("index", method=EKFAC), problem.modules()[0]
    axes = torch.linalg.eigh(fisher(index)).eigenvectors
    left = fisher(index, np.setdiff1d(np.arange(60), GROUP))
    values = ((axes.T @ left) * axes.T).sum(1)
    inverse = axes @ torch.diag(1 / (values + (axes.T @ rates(index, 0.1) * axes.T).sum(1))) @ axes.T
    expected = measured(problem, module, "margin") @ inverse @ negative_loss(problem, module)[GROUP].sum(0) / 60
    found = index.newton_effects(index.query(problem.queries(), 0.1), [GROUP])[:, 0]
    assert relative_error(found, expected) < 1e-3


@pytest.mark.parametrize("shrinkage", [0.4, 1.0])
def test_gauss_newton_is_shrunk_towards_them(problem: Problem, shrinkage: float) -> None:
    index, module = problem.fit("gn", method={**SOLVED, "shrinkage": shrinkage}), problem.modules()[0]
    draws = draws_of(index, np.arange(60))
    everything = torch.einsum("ncp,ncq->pq", draws, draws) / 60
    matrix = (1 - shrinkage) * everything + shrinkage * fisher(index) + rates(index, 0.1)
    expected = measured(problem, module, "margin") @ torch.linalg.inv(matrix) @ negative_loss(problem, module).T / 60
    assert relative_error(scores(index, problem, 0.1), expected) < 1e-3


def test_stored_rows_are_in_the_root_of_the_whole_matrix(problem: Problem) -> None:
    index = problem.fit("index", method=EKFAC, store={"layout": "vectors"})
    matrix, first = fisher(index) + rates(index, 0.1), _slices()[0]
    member = index.members[0]
    found: Whitening = member.whitening[0]  # type: ignore[attr-defined, index]
    assert isinstance(found.sides, WholeRotation)
    root = found.sides.axes.double()
    assert relative_error(root @ matrix[first, first] @ root, torch.eye(LAYERS[0])) < 1e-3
    vectors = torch.randn(3, 1, 6, 6)
    turned = found.sides.forward(found.against(vectors))
    torch.testing.assert_close(turned, vectors, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ekfac", "gauss_newton"])
@pytest.mark.parametrize("name", ["classification", "images"])
def test_nothing_depends_on_batches_or_shards(name: str, kind: str, tmp_path: Path) -> None:
    given = getattr(problems, name)(tmp_path)
    method = {**(SOLVED if kind == "gauss_newton" else EKFAC), "type": kind}
    found = [
        scores(given.fit("index", method=method, batch_size=batch, shard_size=shard), given)
        for batch, shard in ((None, 512), (7, 13))
    ]
    assert relative_error(found[1], found[0]) < 1e-4


def test_an_index_of_before_answers_as_it_did(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its specification does not say what its layers have; its factors do."""
    kronecker = problem.fit("sides", method={**EKFAC, "axes": "positions", "whole_layers": 0})
    with monkeypatch.context() as before:
        before.setattr(sums, "CovarianceSums", lambda blocks, **_: CovarianceSums(blocks))
        old = problem.fit("old", method=EKFAC)
    found = LoadedIndex(old.folder, problem.with_(method=EKFAC))
    assert whole(found) == [False, False]
    assert np.array_equal(scores(found, problem), scores(kronecker, problem))
    new = problem.fit("new", method=EKFAC)
    assert new.spec.fingerprint() == old.spec.fingerprint() != kronecker.spec.fingerprint()
    assert any("whole." in name for name in read_arrays(new.folder / FACTORS_FILE))


def test_a_fit_that_began_before_goes_on(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of factors are no sums of whole gradients: what has the former is computed again."""
    spec = problem.with_(method=EKFAC, shard_size=25)
    with monkeypatch.context() as before:
        before.setattr(sums, "CovarianceSums", lambda blocks, **_: CovarianceSums(blocks))
        old = FitPipeline(spec, tmp_path / "old").run_shard("covariance", 1, NoProgress())
    pipeline, files = FitPipeline(spec, tmp_path / "work"), [tmp_path / str(number) for number in range(3)]
    new = [pipeline.run_shard("covariance", number, NoProgress()) for number in range(3)]
    reduced = []
    for second in (new[1], old):
        for path, arrays in zip(files, (new[0], second, new[2]), strict=True):
            write_arrays(path, arrays)
        reduced.append(pipeline.reduce("covariance", files, NoProgress()))
    assert old.keys() != new[1].keys()
    assert reduced[0].keys() == reduced[1].keys()
    assert all(np.array_equal(value, reduced[1][name]) for name, value in reduced[0].items())
