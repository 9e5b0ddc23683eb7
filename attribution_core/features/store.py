"""Feature rows in shards of consecutive training examples.

A shard file `NNNNN.safetensors` holds `rows` (count, k) as `rows.encoded` has them, with `scales` (count,) and `columns` (1,) where the type needs them, and
`weights` (count,) and `self_influence` (count,), both float32. A training example's score for a query is `weights[i] · ⟨query, rows[i]⟩`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from attribution_core.arrays import write_arrays
from attribution_core.errors import CorruptArtifactError
from attribution_core.features.rows import decoded, rows_at_once

Arrays = dict[str, np.ndarray]
_DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8}


def write_shard(folder: Path, number: int, rows: Arrays, weights: np.ndarray, self_influence: np.ndarray) -> None:
    """Write one shard of `rows.encoded` rows."""
    write_arrays(
        folder / f"{number:05d}.safetensors",
        {
            **rows,
            "weights": weights.astype(np.float32),
            "self_influence": self_influence.astype(np.float32),
        },
    )


class FeatureStore:
    """The shards of one index; rows stay on disk until asked for, and are float32 and unscaled when they come.

    Args:
        folder: where the shards are.
        num_examples: rows of all shards together.

    Raises:
        CorruptArtifactError: if a shard is missing or they do not hold `num_examples` rows.
    """

    def __init__(self, folder: Path, num_examples: int) -> None:
        self.paths = sorted(folder.glob("*.safetensors"))
        small = [_without_rows(path) for path in self.paths]
        if not small:
            raise CorruptArtifactError("the index has no feature shards")
        self.weights = np.concatenate([part["weights"] for part in small])
        self.self_influence = np.concatenate([part["self_influence"] for part in small])
        self._columns = small[0].get("columns")
        self._scales = [part.get("scales") for part in small]
        self.starts = np.cumsum([0, *(len(part["weights"]) for part in small)])
        if len(self.weights) != num_examples:
            raise CorruptArtifactError(f"the feature shards hold {len(self.weights)} rows instead of {num_examples}")

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def dim(self) -> int:
        """Numbers per row."""
        return int(_mapped_rows(self.paths[0]).shape[1] if self._columns is None else self._columns[0])

    @property
    def sizes(self) -> np.ndarray | None:
        """The magnitude that all numbers of a row have, (rows,), weighted; None where rows are not bits."""
        if self._columns is None:
            return None
        scales = np.concatenate([part for part in self._scales if part is not None])
        sizes: np.ndarray = np.abs(scales * self.weights)
        return sizes

    def signs(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(first row, packed signs)` of rows of bits shard by shard, weighted."""
        every = np.packbits(np.ones(self.dim, bool), bitorder="little")  # padding stays 0
        for number, start in enumerate(self.starts[:-1]):
            packed = np.asarray(_mapped_rows(self.paths[number]))
            negative = self.weights[start : start + len(packed)] < 0
            yield int(start), np.where(negative[:, None], packed ^ every, packed) if negative.any() else packed

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(first row, rows)`, rows as float32 (count, k), unweighted: a shard's at once, or some of them where these take much."""
        step = rows_at_once(self.dim)
        for number, start in enumerate(self.starts[:-1]):
            for first in range(0, int(self.starts[number + 1] - start), step):
                yield int(start) + first, self._decoded(number, slice(first, first + step))

    def weighted_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(first row, rows)` with every row multiplied by its weight, as rows are searched."""
        for start, rows in self.blocks():
            yield start, rows * self.weights[start : start + len(rows), None]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the given rows as float32 (len(rows), k), unweighted, in their order; only their pages are read."""
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        found = np.empty((len(rows), self.dim), np.float32)
        for number in np.unique(shard_of):
            places = np.flatnonzero(shard_of == number)
            found[places] = self._decoded(number, rows[places] - self.starts[number])
        return found

    def read_weighted(self, rows: np.ndarray) -> np.ndarray:
        """Return the given rows, each multiplied by its weight, as they are searched."""
        found: np.ndarray = self.read(rows) * self.weights[rows, None]
        return found

    def _decoded(self, number: int, chosen: np.ndarray | slice) -> np.ndarray:
        rows, scales = _mapped_rows(self.paths[number])[chosen], self._scales[number]
        return decoded(rows, None if scales is None else scales[chosen], self._columns)


def _without_rows(path: Path) -> Arrays:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name != "rows"}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise CorruptArtifactError(f"{path.name} cannot be read: {error}") from error


def _mapped_rows(path: Path) -> np.ndarray:
    """Map a shard's rows into memory; the file is closed when the last view of them is gone."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_size))["rows"]
    offset = 8 + header_size + entry["data_offsets"][0]
    return np.memmap(path, _DTYPES[entry["dtype"]], mode="r", offset=offset, shape=tuple(entry["shape"]))
