"""Second moments of the sides of examples' gradients, against gradients formed one by one in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from attribution_core.curvature import CovarianceSums
from attribution_core.curvature.draws import Draws
from attribution_core.gradients import Block, LayerGradient

# groups, positions, d_out, d_in: of rank one; positions fewer than either side, between both, more than both; channels apart.
SHAPES = [(1, 1, 4, 6), (1, 3, 4, 6), (1, 5, 4, 6), (1, 9, 4, 6), (2, 3, 4, 6), (3, 9, 4, 6)]


def drawn(shape: tuple[int, int, int, int], seed: int, size: int = 7) -> LayerGradient:
    groups, positions, d_out, d_in = shape
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = (torch.randn(size, groups, positions, d, generator=generator) for d in (d_in, d_out))
    return LayerGradient(Block("layer", groups, d_out, d_in), inputs, outputs)


def by_example(parts: Sequence[LayerGradient]) -> tuple[Tensor, Tensor]:
    """`Σ ΦᵀΦ` and `Σ ΦΦᵀ`, (groups, d, d) each."""
    whole = [torch.einsum("bgto,bgti->bgoi", part.outputs.double(), part.inputs.double()) for part in parts]
    inputs = sum(torch.einsum("bgoi,bgoj->gij", part, part) for part in whole)
    outputs = sum(torch.einsum("bgoi,bgpi->gop", part, part) for part in whole)
    assert isinstance(inputs, Tensor)
    assert isinstance(outputs, Tensor)
    return inputs, outputs


def sums_of(*batches: Sequence[LayerGradient]) -> dict[str, np.ndarray]:
    sums = CovarianceSums([batches[0][0].block], by_example=True)
    for parts in batches:
        sums.add(Draws([[part] for part in parts]))
    return sums.arrays()


@pytest.mark.parametrize("compact", [False, True], ids=["factors", "whole"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_are_those_of_each_examples_gradient(shape: tuple[int, int, int, int], compact: bool) -> None:
    parts = [drawn(shape, seed) for seed in (0, 1)]
    inputs, outputs = by_example(parts)
    found = sums_of([part.compact() if compact else part for part in parts])
    np.testing.assert_allclose(found["inputs.0"], inputs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["outputs.0"], outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batches_add_up(shape: tuple[int, int, int, int]) -> None:
    whole = drawn(shape, 0)
    together, apart = sums_of([whole]), sums_of([whole[:3]], [whole[3:]])
    for name, value in together.items():
        np.testing.assert_allclose(apart[name], value, rtol=1e-5, atol=1e-5)


def test_positions_of_one_example_are_not_independent() -> None:
    """Two positions that cancel are no gradient at all; position by position they are two."""
    one = drawn((1, 1, 4, 6), 0)
    cancelled = LayerGradient(one.block, one.inputs.repeat(1, 1, 2, 1), torch.cat([one.outputs, -one.outputs], 2))
    by_position = CovarianceSums([one.block])
    by_position.add(Draws([[cancelled]]))
    assert all(np.abs(value).max() < 1e-5 for value in sums_of([cancelled]).values())
    assert all(np.abs(value).max() > 1 for value in by_position.arrays().values())


def test_an_embedding_has_the_moments_of_what_each_row_is_given() -> None:
    """Its rows are looked up one by one, and the gradient of a large vocabulary is never formed."""
    block = Block("embedding", 1, 1000, 6, inputs_fixed=False, outputs_fixed=True)
    generator = torch.Generator().manual_seed(0)
    gradient = LayerGradient(
        block, torch.randn(7, 1, 3, 6, generator=generator), torch.randint(0, 1000, (7, 3), generator=generator)
    )
    found = sums_of([gradient])
    expected = torch.einsum("bgti,bgtj->gij", gradient.inputs, gradient.inputs)
    assert list(found) == ["inputs.0"]
    np.testing.assert_allclose(found["inputs.0"], expected, rtol=1e-5, atol=1e-5)
