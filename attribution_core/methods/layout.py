"""From the shards of the features stage to the rows, gradients and search file of an artifact.

A range of rows has one shard per checkpoint; their rows lie side by side in one file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from attribution_core.arrays import read_arrays
from attribution_core.features.factors import write_gradients
from attribution_core.features.rows import encoded, joined, signs
from attribution_core.features.store import FeatureStore, write_shard
from attribution_core.methods.answers import Query
from attribution_core.methods.artifact import FEATURES_FOLDER, GRADIENTS_FOLDER, SEARCH_FILE
from attribution_core.methods.base import FeatureMethod, QuerySide
from attribution_core.methods.context import FitContext
from attribution_core.methods.encoding import EXACT, GRADIENT, Arrays
from attribution_core.progress import Progress, watched

# The fitted method on each checkpoint.
Members = Sequence[FeatureMethod]


def write_features(
    context: FitContext, members: Members, into: Path, files: Sequence[Path], progress: Progress, first: int = 0
) -> None:
    """Join each range's shards of all checkpoints side by side, in files numbered from `first` on.

    Raises:
        Cancelled: if the work should stop.
    """
    for number, shards in enumerate(watched(_ranges(context, files), progress)):
        weights = _weights(members, shards)
        if "self_influence" in shards[0]:
            own = np.mean([shard["self_influence"] for shard in shards], axis=0)
        else:
            own = _late_self_influence(context, members, shards) * weights
        write_shard(into / FEATURES_FOLDER, first + number, _stored(context, shards), weights, own)
        if context.layout == "factors":
            write_gradients(into / GRADIENTS_FOLDER, first + number, [_gradients_of(shard) for shard in shards])


def write_search(context: FitContext, into: Path, progress: Progress) -> None:
    """Write the search file of the rows that are there, unless an exhaustive search reads the rows themselves.

    Raises:
        Cancelled: if the work should stop.
    """
    spec = context.spec
    if spec.search.type == "flat" or context.layout == "factors":
        return
    from attribution_core.search.faiss_index import VectorIndex  # noqa: PLC0415, megabytes that few indexes need

    store = FeatureStore(into / FEATURES_FOLDER, spec.dataset.num_examples)
    VectorIndex.build(spec.search, store, progress).write(into / SEARCH_FILE)


def exact_scores(
    context: FitContext, members: Members, files: Sequence[Path], progress: Progress, query: Query
) -> np.ndarray:
    """Return the exact scores (queries, n) of the queries by which recall is measured, averaged over checkpoints.

    Where rows are the method's own definition these are inner products of the rows as they were before they were stored.

    Raises:
        Cancelled: if the work should stop.
    """
    parts = []
    for shards in watched(_ranges(context, files), progress):
        if EXACT in shards[0]:
            parts.append(np.mean([shard[EXACT] for shard in shards], axis=0))
            continue
        parts.append(_side_by_side(shards) @ query.rows.T * _weights(members, shards)[:, None])
    return np.concatenate(parts).T


def _ranges(context: FitContext, files: Sequence[Path]) -> Iterator[list[Arrays]]:
    """Yield the shards of all checkpoints, one range of rows after the other."""
    ranges = len(files) // len(context.spec.members)
    for number in range(ranges):
        yield [read_arrays(path) for path in files[number::ranges]]


def _late_self_influence(context: FitContext, members: Members, shards: Sequence[Arrays]) -> np.ndarray:
    """Return `mean_m ⟨(K + λ)⁻¹ P∇m_i, φ_i⟩` of one range's rows, known only now that the kernel is."""
    total = np.zeros(len(shards[0]["rows"]))
    for number, shard in enumerate(shards):
        own = torch.from_numpy(shard.get("measured", shard["rows"]))
        damping = getattr(context.spec.method, "damping", 0.0)
        solved = members[number].precondition(QuerySide(own, own), damping).rows
        total += np.einsum("ik,ik->i", solved.numpy(), shard["rows"], dtype=np.float64) / len(shards)
    return total


def _stored(context: FitContext, shards: Sequence[Arrays]) -> Arrays:
    """Return the rows of one range as they are stored, from the shards of all checkpoints."""
    if context.row_type == "binary":
        # Shards of a fit that began before there were signs have rows.
        parts = [shard if "signs" in shard else shard | signs(shard["rows"]) for shard in shards]
        return joined(parts, context.row_size)
    return encoded(_side_by_side(shards), context.row_type)


def _side_by_side(shards: Sequence[Arrays]) -> np.ndarray:
    """Return the rows (count, k) of one range."""
    return np.concatenate([shard["rows"] for shard in shards], axis=1)


def _weights(members: Members, shards: Sequence[Arrays]) -> np.ndarray:
    """Return what the rows of one range count, (count,)."""
    pairs = zip(members, shards, strict=True)
    counted = [member.counted(torch.from_numpy(shard["weights"])) for member, shard in pairs]
    weights: np.ndarray = torch.stack(counted).mean(0).numpy()
    return weights


def _gradients_of(shard: Arrays) -> Arrays:
    return {name.removeprefix(GRADIENT): value for name, value in shard.items() if name.startswith(GRADIENT)}
