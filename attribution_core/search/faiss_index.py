"""FAISS indexes over weighted feature rows; negatives are found by searching for the negated query.

`flat` is exhaustive. `ivf` visits the clusters nearest to the query, and for negatives those nearest to the *negated* query, which
are others. Filters are exact: a search that fills fewer places than asked visits more clusters until none is left.
"""

from collections.abc import Iterable
from pathlib import Path

import faiss
import numpy as np

from attribution_core.errors import CorruptArtifactError
from attribution_core.search.merge import Ranked
from attribution_core.spec import SearchSpec

FILE_NAME = "search.faiss"
_TRAINING_ROWS_PER_LIST = 64
_MAX_FILE_BYTES = 1 << 40

faiss.set_deserialization_vector_byte_limit(_MAX_FILE_BYTES)
faiss.set_deserialization_loop_limit(1 << 31)


class VectorIndex:
    """Inner-product search over n rows.

    Args:
        index: the FAISS index, with rows added in order.
    """

    def __init__(self, index: faiss.Index) -> None:
        self._index = index

    @classmethod
    def build(cls, spec: SearchSpec, blocks: Iterable[tuple[int, np.ndarray]], n: int, dim: int) -> "VectorIndex":
        """Build from `(first row, weighted rows)` blocks; equal rows give an equal index."""
        if spec.type == "flat":
            index = faiss.IndexFlatIP(dim)
            for _, rows in blocks:
                index.add(rows)
            return cls(index)
        return cls(_built_ivf(spec, np.concatenate([rows for _, rows in blocks]), n, dim))

    @classmethod
    def read(cls, path: Path) -> "VectorIndex":
        """Read a file that this class wrote and whose checksum was verified.

        Raises:
            CorruptArtifactError: if FAISS cannot read it.
        """
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise CorruptArtifactError(f"{path.name} cannot be read: {error}") from error

    def write(self, path: Path) -> None:
        """Write the index to a file."""
        faiss.write_index(self._index, str(path))

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Ranked:
        """Return the k rows of largest inner product per query, (queries, ≤ k); row -1 fills short lists.

        Args:
            queries: (queries, d) float32.
            k: capped at the number of allowed rows.
            allowed: (n,) bool, all by default.
        """
        count = self._index.ntotal if allowed is None else int(allowed.sum())
        k = min(k, count)
        if k == 0:
            return Ranked.empty(len(queries))
        selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        probes = getattr(self._index, "nprobe", None)
        while True:
            scores, rows = self._index.search(queries, k, params=self._parameters(selector, probes))
            if probes is None or probes >= self._index.nlist or not (rows < 0).any():
                return Ranked(rows, scores)
            probes = min(2 * probes, self._index.nlist)

    def _parameters(self, selector: faiss.IDSelector | None, probes: int | None) -> faiss.SearchParameters:
        options = {} if selector is None else {"sel": selector}
        if probes is None:
            return faiss.SearchParameters(**options)
        return faiss.SearchParametersIVF(nprobe=probes, **options)


def _built_ivf(spec: SearchSpec, rows: np.ndarray, n: int, dim: int) -> faiss.Index:
    lists = min(spec.lists or max(1, round(4 * n**0.5)), n)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 1
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _TRAINING_ROWS_PER_LIST
    threads = faiss.omp_get_max_threads()
    # The order in which threads add up centroids would otherwise show in the file's bytes.
    faiss.omp_set_num_threads(1)
    try:
        index.train(rows)
        index.add(rows)
    finally:
        faiss.omp_set_num_threads(threads)
    index.nprobe = min(spec.probes or max(1, lists // 4), lists)
    return index
