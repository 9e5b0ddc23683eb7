"""Feature shards: what is read is what was written, in any order, and damage is noticed."""

from pathlib import Path

import numpy as np
import pytest

from attribution_core.errors import CorruptArtifactError
from attribution_core.features import rows as rows_module
from attribution_core.features.rows import RowType, encoded, joined, signs
from attribution_core.features.store import FeatureStore, write_shard

RNG = np.random.default_rng(0)


def written(
    folder: Path, sizes: list[int], scale: float = 1.0, dtype: RowType = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    rows = (scale * RNG.normal(size=(sum(sizes), 7))).astype(np.float32)
    weights = RNG.uniform(0.5, 2, size=len(rows)).astype(np.float32)
    start = 0
    for number, size in enumerate(sizes):
        part = slice(start, start + size)
        write_shard(folder, number, encoded(rows[part], dtype), weights[part], weights[part] * 10)
        start += size
    return rows, weights


@pytest.mark.parametrize("sizes", [[10], [4, 4, 2], [1] * 10])
def test_rows_come_back_whatever_the_shards(tmp_path: Path, sizes: list[int]) -> None:
    rows, weights = written(tmp_path, sizes)
    store = FeatureStore(tmp_path, 10)
    wanted = np.array([9, 0, 3, 3, 8, 1])
    np.testing.assert_array_equal(store.read(wanted), rows[wanted])
    assert store.read(np.empty(0, np.int64)).shape == (0, 7)
    np.testing.assert_array_equal(store.weights, weights)
    np.testing.assert_array_equal(store.self_influence, weights * 10)
    assert [start for start, _ in store.blocks()] == np.cumsum([0, *sizes[:-1]]).tolist()
    np.testing.assert_array_equal(np.concatenate([block for _, block in store.blocks()]), rows)
    weighted = np.concatenate([block for _, block in store.weighted_blocks()])
    np.testing.assert_array_equal(weighted, rows * weights[:, None])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_float16_keeps_scores_whatever_the_scale_of_the_gradients(tmp_path: Path, scale: float) -> None:
    rows, weights = written(tmp_path, [6, 4], scale, dtype="float16")
    store = FeatureStore(tmp_path, 10)
    found = np.concatenate([block for _, block in store.weighted_blocks()])
    assert found.dtype == np.float32
    assert np.abs(found - rows * weights[:, None]).max() < 1e-3 * scale * 4
    exact = FeatureStore(_plain(tmp_path / "plain", rows, weights), 10)
    assert store.paths[0].stat().st_size < exact.paths[0].stat().st_size


def _plain(folder: Path, rows: np.ndarray, weights: np.ndarray) -> Path:
    write_shard(folder, 0, encoded(rows, "float32"), weights, weights)
    return folder


def naive(rows: np.ndarray, dtype: RowType) -> np.ndarray:
    """What a type keeps of each row, number by number in float64."""
    found = []
    for row in rows.astype(np.float64):
        if dtype == "int8":
            largest = max(abs(number) for number in row)
            found.append([round(127 * number / largest) * largest / 127 for number in row])
        else:
            scale = sum(number**2 for number in row) / sum(abs(number) for number in row)
            found.append([scale if number > 0 else -scale for number in row])
    return np.array(found)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_few_bits_per_number_come_back_as_they_should(tmp_path: Path, dtype: RowType, scale: float) -> None:
    rows, weights = written(tmp_path, [6, 4], scale, dtype=dtype)
    store = FeatureStore(tmp_path, 10)
    assert store.dim == 7
    np.testing.assert_array_equal(store.weights, weights)
    expected = naive(rows, dtype)
    wanted = np.array([9, 0, 3, 3, 8, 1])
    np.testing.assert_allclose(store.read(wanted), expected[wanted], rtol=1e-5)
    np.testing.assert_allclose(store.read_weighted(wanted), expected[wanted] * weights[wanted, None], rtol=1e-5)
    found = np.concatenate([block for _, block in store.weighted_blocks()])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected * weights[:, None], rtol=1e-5)
    assert store.read(np.empty(0, np.int64)).shape == (0, 7)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("int8", 0.02), ("binary", 0.8)])
def test_scores_keep_their_size(tmp_path: Path, dtype: RowType, error: float) -> None:
    """The slope of decoded on true scores is 1; bits with the scale of least error would have 2/π."""
    rows = RNG.normal(size=(400, 512)).astype(np.float32) * RNG.uniform(1e-3, 1e3, (400, 1)).astype(np.float32)
    directions = RNG.normal(size=(20, 512)) + rows[:20] / np.linalg.norm(rows[:20], axis=1, keepdims=True) * 10
    write_shard(tmp_path, 0, encoded(rows, dtype), np.ones(400), np.ones(400))
    found = FeatureStore(tmp_path, 400).read(np.arange(400))
    unit = np.linalg.norm(rows, axis=1)
    true, kept = (directions @ matrix.T / unit for matrix in (rows.astype(np.float64), found.astype(np.float64)))
    assert abs((true * kept).sum() / (true * true).sum() - 1) < 0.03
    assert np.sqrt(((kept - true) ** 2).mean() / (true**2).mean()) < error


@pytest.mark.parametrize(("dtype", "most"), [("float16", 0.6), ("int8", 0.35), ("binary", 0.12)])
def test_rows_take_the_bytes_that_were_asked_for(tmp_path: Path, dtype: RowType, most: float) -> None:
    rows = RNG.normal(size=(64, 256)).astype(np.float32)
    names: tuple[RowType, ...] = ("float32", dtype)
    for name in names:
        write_shard(tmp_path / name, 0, encoded(rows, name), np.ones(64), np.ones(64))
    sizes = [FeatureStore(tmp_path / name, 64).paths[0].stat().st_size for name in ("float32", dtype)]
    assert sizes[1] < most * sizes[0]


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
def test_a_row_of_zeros_is_a_row_of_zeros(tmp_path: Path, dtype: RowType) -> None:
    write_shard(tmp_path, 0, encoded(np.zeros((2, 3), np.float32), dtype), np.ones(2), np.zeros(2))
    np.testing.assert_array_equal(FeatureStore(tmp_path, 2).read(np.array([0, 1])), np.zeros((2, 3)))


def test_missing_and_damaged_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match="no feature shards"):
        FeatureStore(tmp_path, 10)
    written(tmp_path, [6, 4])
    with pytest.raises(CorruptArtifactError, match="10 rows instead of 11"):
        FeatureStore(tmp_path, 11)
    last = tmp_path / "00001.safetensors"
    last.write_bytes(last.read_bytes()[:-20])
    with pytest.raises(CorruptArtifactError, match="00001"):
        FeatureStore(tmp_path, 10)


@pytest.mark.parametrize("columns", [16, 13])
def test_bits_of_parts_are_those_of_the_whole(columns: int) -> None:
    """Parts are the checkpoints', whose rows lie side by side."""
    rows = RNG.normal(size=(9, 3 * columns)).astype(np.float32)
    found = joined([signs(part) for part in np.split(rows, 3, axis=1)], columns)
    for name, value in encoded(rows, "binary").items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_signs_of_nothing_are_not_left_to_rounding() -> None:
    row = np.array([[1.0, -1.0, 0.0, -0.0, 1e-7, -1e-7, -1e-2]], np.float32)
    np.testing.assert_array_equal(np.unpackbits(signs(row)["signs"], count=7, bitorder="little"), [1, 0, 1, 1, 1, 1, 0])


def test_large_rows_are_decoded_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, [6, 4], dtype="binary")
    whole = np.concatenate([block for _, block in FeatureStore(tmp_path, 10).weighted_blocks()])
    monkeypatch.setattr(rows_module, "_NUMBERS_AT_ONCE", 15)
    blocks = list(FeatureStore(tmp_path, 10).weighted_blocks())
    assert [(start, len(block)) for start, block in blocks] == [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2)]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), whole)


def test_signs_and_sizes_are_those_of_the_weighted_rows(tmp_path: Path) -> None:
    rows = RNG.normal(size=(10, 13)).astype(np.float32)
    weights = np.where(np.arange(10) % 3 == 0, -2.0, 0.5)
    for number, part in enumerate((slice(0, 6), slice(6, 10))):
        write_shard(tmp_path, number, encoded(rows[part], "binary"), weights[part], weights[part])
    store = FeatureStore(tmp_path, 10)
    assert store.sizes is not None
    for start, packed in store.signs():
        assert not np.unpackbits(packed, axis=1, bitorder="little")[:, 13:].any()
        signs = 2.0 * np.unpackbits(packed, axis=1, count=13, bitorder="little") - 1
        found = signs * store.sizes[start : start + len(packed), None]
        np.testing.assert_allclose(found, store.read_weighted(np.arange(start, start + len(packed))), rtol=1e-6)
    assert FeatureStore(_plain(tmp_path / "plain", rows, weights), 10).sizes is None
