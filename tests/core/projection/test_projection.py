"""Projections against their explicit matrices, and the property they exist for."""

import numpy as np
import pytest
import torch

from attribution_core.errors import ProjectionMismatchError
from attribution_core.method_spec import ProjectionSpec
from attribution_core.projection import build_projection, check
from attribution_core.projection.sjlt import SparseProjection
from attribution_core.random_numbers import hashed

TYPES = ("sjlt", "rademacher", "gaussian")


def projection(kind: str, dim: int = 64, seed: int = 3):
    return build_projection(ProjectionSpec(type=kind, dim=dim, seed=seed))


@pytest.mark.parametrize("kind", TYPES)
def test_parts_and_batches_do_not_change_the_result(kind: str) -> None:
    values = torch.randn(7, 500, dtype=torch.float64)
    whole = projection(kind).project([values])
    torch.testing.assert_close(projection(kind).project(list(values.split([100, 1, 399], dim=1))), whole)
    torch.testing.assert_close(torch.cat([projection(kind).project([v]) for v in values.split(2)]), whole)
    torch.testing.assert_close(values @ projection(kind).matrix(500), whole)


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_of_generated_entries_do_not_change_the_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 100, dtype=torch.float64)
    whole = projection(kind).project([values])
    monkeypatch.setattr("attribution_core.projection.dense._ENTRIES_AT_ONCE", 64 * 7)
    torch.testing.assert_close(projection(kind).project([values]), whole)


@pytest.mark.parametrize("kind", TYPES)
def test_the_seed_chooses_the_map(kind: str) -> None:
    assert torch.equal(projection(kind).matrix(50), projection(kind).matrix(50))
    assert not torch.equal(projection(kind).matrix(50), projection(kind, seed=4).matrix(50))


@pytest.mark.parametrize("kind", TYPES)
def test_inner_products_are_kept_on_average(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 300, dtype=torch.float64, generator=generator)
    found = torch.stack(
        [
            torch.stack([p.project([x[None]])[0] @ p.project([y[None]])[0]])
            for p in (projection(kind, 64, s) for s in range(400))
        ]
    ).flatten()
    error = found.std() / 400**0.5
    assert abs(found.mean() - x @ y) < 4 * error
    assert found.std() < 1.3 * ((x @ x) * (y @ y) / 64 + (x @ y) ** 2 / 64) ** 0.5


def test_sparse_matrix_is_its_tables() -> None:
    sparse = SparseProjection(16, 5)
    buckets, signs = sparse.tables(0, 40)
    explicit = np.zeros((40, 16))
    explicit[np.arange(40), buckets] = signs
    np.testing.assert_array_equal(sparse.matrix(40).numpy(), explicit)


@pytest.mark.parametrize("kind", check.kinds())
def test_a_machine_that_generates_another_map_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check.verify_projections()
    tampered = {
        "sjlt": "attribution_core.projection.sjlt.hashed",
        "rademacher": "attribution_core.projection.dense.hashed",
        "gaussian": "attribution_core.random_numbers.hashed",
        "factored": "attribution_core.projection.factored.hashed",
    }
    monkeypatch.setattr(tampered[kind], lambda seed, counters: hashed(seed + 1, counters))
    with pytest.raises(ProjectionMismatchError, match=kind):
        check.verify_projections()
    assert check.digest(kind) != check.GOLDEN[kind]
    check.check_projections.cache_clear()
    with pytest.raises(ProjectionMismatchError):
        projection("sjlt")
    monkeypatch.undo()
    projection("sjlt")


def test_hash_is_frozen() -> None:
    """Stored features depend on these bits: a change needs a new PROJECTION_VERSION."""
    assert hashed(0, np.arange(3)).tolist() == [4295609322031115183, 9735418304920043012, 4249279899635324798]
    assert hashed(7, np.array([2**40])).tolist() == [6342048910881105812]
