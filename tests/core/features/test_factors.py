"""Stored gradients of many shards: what is read is what was written, and a file is opened once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from attribution_core.arrays import mapped_arrays, write_arrays
from attribution_core.features import factors
from attribution_core.features.factors import GradientStore, encoded, write_gradients
from attribution_core.gradients import Block, LayerGradient

RNG = np.random.default_rng(0)
SHARDS, ROWS, LAYERS = 40, 3, 12
BLOCKS = [Block(f"layer_{number}", 1, 4, 5) for number in range(LAYERS)]


def test_arrays_of_every_type_are_views_of_one_mapping(tmp_path: Path) -> None:
    arrays = {
        "b.half": RNG.normal(size=(3, 5)).astype(np.float16),
        "a.bytes": RNG.integers(-9, 9, (7,)).astype(np.int8),
        "c.single": RNG.normal(size=(2, 3, 1)).astype(np.float32),
        "d.double": RNG.normal(size=3),
        "e.scalar": np.array(2.0, np.float32),
    }
    write_arrays(tmp_path / "arrays.safetensors", arrays)
    found = mapped_arrays(tmp_path / "arrays.safetensors")
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        assert not found[name].flags.writeable
        np.testing.assert_array_equal(found[name], value)


def test_gradients_come_back_from_many_shards_with_one_mapping_each(tmp_path: Path) -> None:
    inputs = torch.from_numpy(RNG.normal(size=(SHARDS * ROWS, LAYERS, 1, 1, 5)).astype(np.float32))
    outputs = torch.from_numpy(RNG.normal(size=(SHARDS * ROWS, LAYERS, 1, 1, 4)).astype(np.float32))
    for shard in range(SHARDS):
        part = slice(shard * ROWS, (shard + 1) * ROWS)
        gradients = [LayerGradient(block, inputs[part, i], outputs[part, i]) for i, block in enumerate(BLOCKS)]
        write_gradients(tmp_path, shard, [encoded(gradients, "float32")])
    store = GradientStore(tmp_path, np.arange(0, SHARDS * ROWS + 1, ROWS), BLOCKS)
    mapped = [region.path for region in psutil.Process().memory_maps(grouped=False)]
    assert sum(path.startswith(str(tmp_path)) for path in mapped) == SHARDS
    rows = np.array([0, 1, 2, 7, 30, 31, 119])
    for places, gradients in store.read(0, rows):
        for number, gradient in enumerate(gradients):
            expected = outputs[rows[places], number, :, 0].unsqueeze(-1) * inputs[rows[places], number, :, 0, None]
            torch.testing.assert_close(gradient.materialise(), expected)


@pytest.mark.parametrize("at_once", [1, 3, 512])
@pytest.mark.parametrize("rows", [range(10), [0, 1, 2, 7, 4, 9], []])
def test_rows_are_the_same_however_many_are_decoded_at_once(
    at_once: int, rows: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "_ROWS_AT_ONCE", at_once)
    inputs, outputs = (torch.from_numpy(RNG.normal(size=(10, 1, 1, d)).astype(np.float32)) for d in (5, 4))
    write_gradients(tmp_path, 0, [encoded([LayerGradient(BLOCKS[0], inputs, outputs)], "float32")])
    store, asked = GradientStore(tmp_path, np.array([0, 10]), BLOCKS[:1]), np.array(rows, dtype=np.int64)
    found = torch.full((len(asked), 4, 5), torch.nan)
    for places, (gradient,) in store.read(0, asked):
        assert len(places) <= at_once
        found[places] = gradient.materialise()[:, 0]
    torch.testing.assert_close(found, (outputs[:, 0, 0, :, None] * inputs[:, 0, 0, None, :])[asked])
