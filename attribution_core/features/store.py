"""Feature rows in shards of consecutive training examples.

A shard file `NNNNN.safetensors` holds `rows` (count, k) in the store's dtype, `weights` (count,) and `self_influence` (count,), both float32.
A training example's score for a query is `weights[i] · ⟨query, rows[i]⟩`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.errors import CorruptArtifactError

Arrays = dict[str, np.ndarray]


def write_shard(folder: Path, number: int, rows: np.ndarray, weights: np.ndarray, self_influence: np.ndarray) -> None:
    """Write one shard; `rows` keeps its dtype."""
    write_arrays(
        folder / f"{number:05d}.safetensors",
        {"rows": rows, "weights": weights.astype(np.float32), "self_influence": self_influence.astype(np.float32)},
    )


class FeatureStore:
    """The shards of one index; rows stay on disk until asked for.

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
        self.starts = np.cumsum([0, *(len(part["weights"]) for part in small)])
        if len(self.weights) != num_examples:
            raise CorruptArtifactError(f"the feature shards hold {len(self.weights)} rows instead of {num_examples}")

    def __len__(self) -> int:
        return len(self.weights)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(first row, rows)` shard by shard, rows as float32 (count, k), unweighted."""
        for number, path in enumerate(self.paths):
            yield int(self.starts[number]), read_arrays(path)["rows"].astype(np.float32)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the given rows as float32 (len(rows), k), unweighted, in their order."""
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for number in np.unique(shard_of):
            places = np.flatnonzero(shard_of == number)
            values = read_arrays(self.paths[number])["rows"][rows[places] - self.starts[number]]
            parts.append((places, values.astype(np.float32)))
        found = np.empty((len(rows), parts[0][1].shape[1] if parts else 0), np.float32)
        for places, values in parts:
            found[places] = values
        return found


def _without_rows(path: Path) -> Arrays:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in ("weights", "self_influence")}
