"""FAISS indexes over weighted feature rows; negatives are found by searching for the negated query.

`flat` is exhaustive. `ivf` visits the clusters nearest to the query, and for negatives those nearest to the *negated* query, which
are others. Only allowed rows are ever returned, and a filtered search visits as many more clusters as the filter leaves rows out.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np

from attribution_core.errors import CorruptArtifactError
from attribution_core.search.merge import Ranked, ordered
from attribution_core.spec import SearchSpec

FILE_NAME = "search.faiss"
Blocks = Callable[[], Iterable[tuple[int, np.ndarray]]]
_TRAINING_ROWS_PER_LIST = 64
# Asked for beyond k, to see whether rows of equal score were cut off.
_MARGIN = 8


class VectorIndex:
    """Inner-product search over n rows.

    Args:
        index: the FAISS index, with rows added in order.
    """

    def __init__(self, index: faiss.Index) -> None:
        self._index = index

    @classmethod
    def build(cls, spec: SearchSpec, blocks: Blocks, n: int, dim: int) -> "VectorIndex":
        """Build from n weighted rows; equal rows give an equal index.

        Args:
            spec: the kind of index.
            blocks: called for a pass over `(first row, rows)`; clusters are trained on a sample in a pass of its own.
            n: how many rows there are.
            dim: numbers per row.
        """
        index = faiss.IndexFlatIP(dim) if spec.type == "flat" else _trained_ivf(spec, blocks, n, dim)
        with _one_thread():
            for _, rows in blocks():
                index.add(np.ascontiguousarray(rows, np.float32))
        return cls(index)

    @classmethod
    def read(cls, path: Path) -> "VectorIndex":
        """Read a file that this class wrote and whose checksum was verified.

        Raises:
            CorruptArtifactError: if FAISS cannot read it.
        """
        # No part of a file is larger than the file, whatever its headers claim.
        faiss.set_deserialization_vector_byte_limit(path.stat().st_size)
        faiss.set_deserialization_loop_limit(path.stat().st_size)
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise CorruptArtifactError(f"{path.name} cannot be read: {error}") from error

    def write(self, path: Path) -> None:
        """Write the index to a file."""
        faiss.write_index(self._index, str(path))

    @property
    def exhaustive(self) -> bool:
        """Whether a search looks at every row."""
        return not isinstance(self._index, faiss.IndexIVF) or self._index.nprobe >= self._index.nlist

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Ranked:
        """Return the k rows of largest inner product per query, (queries, ≤ k), equal scores by row number.

        Args:
            queries: (queries, d) float32.
            k: capped at the number of allowed rows.
            allowed: (n,) bool, all by default.
        """
        count = self._index.ntotal if allowed is None else int(allowed.sum())
        k = min(k, count)
        if k == 0 or not len(queries):
            return Ranked.empty(len(queries))
        selector = None if allowed is None else _selector(allowed)
        wanted = min(k + _MARGIN, count)
        while True:
            found = self._search(queries, wanted, count, selector)
            # FAISS keeps any of equal scores; ask for more until the last of them is among those found.
            if wanted == count or (found.scores[:, -1] < found.scores[:, k - 1]).all():
                return ordered(found, k)
            wanted = min(8 * wanted, count)

    def _search(self, queries: np.ndarray, k: int, count: int, selector: faiss.IDSelector | None) -> Ranked:
        chosen = {} if selector is None else {"sel": selector}
        if not isinstance(self._index, faiss.IndexIVF):
            scores, rows = self._index.search(queries, k, params=faiss.SearchParameters(**chosen))
            return Ranked(rows, scores)
        probes = min(-(-self._index.nprobe * self._index.ntotal // count), self._index.nlist)
        while True:
            options = faiss.SearchParametersIVF(nprobe=probes, **chosen)  # type: ignore[call-arg]
            scores, rows = self._index.search(queries, k, params=options)
            if probes == self._index.nlist or (rows >= 0).all():
                return Ranked(rows, scores)
            probes = min(2 * probes, self._index.nlist)


def _trained_ivf(spec: SearchSpec, blocks: Blocks, n: int, dim: int) -> faiss.IndexIVFFlat:
    lists = min(spec.lists or max(1, round(4 * n**0.5)), n)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 1
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _TRAINING_ROWS_PER_LIST
    step = max(1, n // (lists * _TRAINING_ROWS_PER_LIST))
    sample = np.concatenate([rows[-start % step :: step] for start, rows in blocks()])
    with _one_thread():
        index.train(np.ascontiguousarray(sample, np.float32))
    index.nprobe = min(spec.probes or max(1, lists // 4), lists)
    return index


def _selector(allowed: np.ndarray) -> faiss.IDSelector:
    # FAISS's type stubs describe the C++ constructors, not the ones that Python has.
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))  # type: ignore[call-arg, arg-type]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the order in which threads add up centroids out of the file's bytes."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
