"""The factored projection against explicit matrices, whatever form a layer's gradients come in."""

import pytest
import torch
from torch import Tensor

from attribution_core.gradients import Block, DenseGradient, LayerGradient
from attribution_core.method_spec import ProjectionSpec
from attribution_core.projection import build_projection

POSITIONS = 5
BLOCKS = {
    "both sides": Block("linear", 1, 11, 13),
    "inputs only": Block("narrow", 1, 2, 90),
    "outputs only": Block("wide", 1, 90, 2),
    "groups": Block("grouped", 3, 6, 7),
    "whole": Block("small", 1, 2, 3),
    "rows used": Block("embedding", 1, 17, 6, outputs_fixed=True),
}


def gradient(block: Block, seed: int = 0) -> LayerGradient:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4, block.groups, POSITIONS, block.d_in, dtype=torch.float64, generator=generator)
    if block.outputs_fixed:
        return LayerGradient(block, inputs, torch.randint(0, block.d_out, (4, POSITIONS), generator=generator))
    shape = (4, block.groups, POSITIONS, block.d_out)
    return LayerGradient(block, inputs, torch.randn(shape, dtype=torch.float64, generator=generator))


def projection(*blocks: Block, dim: int, seed: int = 3):
    return build_projection(ProjectionSpec(type="factored", dim=dim, seed=seed), blocks)


def dense(of: LayerGradient) -> DenseGradient:
    return DenseGradient(of.block, of.materialise(), of.inputs.new_empty(0))


def matrix(block: Block, dim: int) -> Tensor:
    """Return the map as a matrix, from what it makes of unit gradients."""
    units = torch.eye(block.numel, dtype=torch.float64).view(-1, *block.shape)
    return projection(block, dim=dim).project([units])


@pytest.mark.parametrize("name", BLOCKS)
def test_every_form_of_a_gradient_has_the_same_projection(name: str) -> None:
    block = BLOCKS[name]
    given = gradient(block)
    expected = given.materialise().flatten(1) @ matrix(block, 16)
    assert 0 < expected.shape[1] <= 16
    for form in (given, dense(given), given.compact()):
        torch.testing.assert_close(projection(block, dim=16).project_gradients([form]), expected)


def test_blocks_lie_side_by_side() -> None:
    blocks = list(BLOCKS.values())
    given = [gradient(block, number) for number, block in enumerate(blocks)]
    together = projection(*blocks, dim=100)
    rows = together.project_gradients(given)
    assert rows.shape == (4, together.dim)
    torch.testing.assert_close(rows, together.project([part.materialise() for part in given]))
    torch.testing.assert_close(rows, together.project_gradients([dense(part) for part in given]))
    small = rows[:, together.slices[blocks.index(BLOCKS["whole"])]]
    torch.testing.assert_close(small, given[blocks.index(BLOCKS["whole"])].materialise().flatten(1))


@pytest.mark.parametrize("name", ["both sides", "inputs only", "outputs only", "rows used"])
def test_inner_products_are_kept_on_average(name: str) -> None:
    block = BLOCKS[name]
    first, second = gradient(block, 1)[:1], gradient(block, 2)[:1]
    expected = (first.materialise() * second.materialise()).sum()
    seeds = 600
    found = torch.stack(
        [
            (p.project_gradients([first]) * p.project_gradients([second])).sum()
            for p in (projection(block, dim=24, seed=seed) for seed in range(seeds))
        ]
    )
    assert abs(found.mean() - expected) < 4 * found.std() / seeds**0.5
    assert found.std() > 0
