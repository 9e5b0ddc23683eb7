"""FAISS indexes over weighted feature rows; negatives are found by searching for the negated query.

`flat` is exhaustive; rows of bits stay bits in memory, are compared with the query's numbers in 8 bits each, and what that finds is scored again.
`ivf` visits the clusters nearest to the query, and for negatives those nearest to the *negated* query, which
are others. `ivfpq` does so over short codes (a cluster's centre and a product-quantised residual) and scores what it finds again from the stored
rows. Returned scores are inner products of stored rows in every case.

Gradients differ in length by orders of magnitude, and the longest score highest. So rows are put into clusters by Euclidean distance, and clusters
visited by the score their best rows may have: `⟨q, c⟩ + 2 ‖q‖ ρ_c / √d`, with the centre `c` and the root-mean-square distance `ρ_c` of its rows. Long
rows so get small clusters of their own, which are visited first. With the usual spherical clusters in the order of ⟨q, c⟩ several times
as many rows must be scanned for the same recall (measured in `docs/studies/search.md`).

Only allowed rows are ever returned. Few allowed rows are scanned exactly; among more, a search visits as many more clusters as the filter leaves rows
out, and twice as many again until its list is full.

Sources: Jégou et al. 2011, Product Quantization for Nearest Neighbor Search; Johnson et al. 2019 (FAISS).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np

from attribution_core.arrays import read_arrays, write_arrays
from attribution_core.errors import CorruptArtifactError
from attribution_core.features.rows import rows_at_once
from attribution_core.progress import NoProgress, Progress, watched
from attribution_core.search.exact import Blocks
from attribution_core.search.merge import Ranked, ordered
from attribution_core.spec import SearchSpec

RADII_FILE_NAME = "search-radii.safetensors"
# A filter that leaves at most so many rows is answered by scanning them.
SCANNED_ROWS = 8192
_TRAINING_ROWS_PER_LIST = 64
_MAX_TRAINING_ROWS = 1 << 17
# Asked for beyond k, to see whether rows of equal score were cut off.
_MARGIN = 8
# Rows found by their codes and scored again, per row wanted and at least.
_REFINED = 16
_REFINED_BITS = 2
_MIN_REFINED = 400
_DIMS_PER_CODE = 4
# Of each number of a query that is compared with bits.
_QUERY_BITS = 8
# How many standard deviations above its cluster's mean score a row worth finding is.
_DEVIATIONS = 2.0


class Rows(Blocks, Protocol):
    """What is searched: n rows, each multiplied by its weight."""

    @property
    def dim(self) -> int:
        """Numbers per row."""

    @property
    def sizes(self) -> np.ndarray | None:
        """The magnitude that all numbers of a row have, (n,) and not negative; None where they have several."""

    def signs(self) -> Iterable[tuple[int, np.ndarray]]:
        """Yield `(first row, signs (count, ⌈dim/8⌉))` of such rows, packed from the lowest bit, 1 for positive."""

    def __len__(self) -> int: ...

    def read_weighted(self, rows: np.ndarray) -> np.ndarray:
        """Return the given rows, (len(rows), dim) float32."""


class VectorIndex:
    """Inner-product search over n rows.

    Args:
        index: the FAISS index, with rows added in order.
        rows: the rows themselves, read where codes are not enough.
        radii: (clusters,) float32, the root-mean-square distance of each cluster's rows from its centre; None where there are no clusters.
    """

    def __init__(self, index: faiss.Index, rows: Rows, radii: np.ndarray | None = None) -> None:
        self._index: Any = index  # FAISS's type stubs know too little of its classes
        self._rows = rows
        self._radii = radii
        self._flips = _flips(index.d) if isinstance(index, faiss.IndexRaBitQ) else None

    @classmethod
    def build(cls, spec: SearchSpec, rows: Rows, progress: Progress | None = None) -> "VectorIndex":
        """Build from weighted rows; equal rows give an equal index.

        Clusters and codes are trained on evenly spread rows, in a pass of its own. Progress counts nothing: it is asked between blocks
        whether the work should stop.

        Raises:
            Cancelled: if it should.
        """
        progress = progress or NoProgress()
        with _one_thread():
            if spec.type != "flat":
                return cls._clustered(spec, rows, progress)
            if rows.sizes is not None:
                return cls._of_bits(rows, rows.sizes, progress)
            index: Any = faiss.IndexFlatIP(rows.dim)
            for _, block in watched(rows.weighted_blocks(), progress):
                index.add(_padded(block, rows.dim))
            return cls(index, rows)

    @classmethod
    def read(cls, path: Path, rows: Rows) -> "VectorIndex":
        """Read a file that this class wrote and whose checksum was verified.

        Raises:
            CorruptArtifactError: if FAISS cannot read it, or its radii are missing.
        """
        # No part of a file is larger than the file, whatever its headers claim.
        faiss.set_deserialization_vector_byte_limit(path.stat().st_size)
        faiss.set_deserialization_loop_limit(path.stat().st_size)
        try:
            # The table is for distances, is used by no inner product, and may be larger than the file.
            index: Any = faiss.read_index(str(path), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
        except RuntimeError as error:
            raise CorruptArtifactError(f"{path.name} cannot be read: {error}") from error
        if not isinstance(index, faiss.IndexIVF):
            return cls(index, rows)
        radii = read_arrays(path.with_name(RADII_FILE_NAME)).get("radii", np.empty(0))
        if len(radii) != index.nlist:
            raise CorruptArtifactError(f"{RADII_FILE_NAME} does not fit {path.name}")
        return cls(index, rows, radii)

    def write(self, path: Path) -> None:
        """Write the index to a file, and what belongs to its clusters beside it."""
        faiss.write_index(self._index, str(path))
        if self._radii is not None:
            write_arrays(path.with_name(RADII_FILE_NAME), {"radii": self._radii})

    @property
    def exhaustive(self) -> bool:
        """Whether a search compares the query with every row as it is stored."""
        return not self._coded and (
            not isinstance(self._index, faiss.IndexIVF) or self._index.nprobe >= self._index.nlist
        )

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
        if allowed is not None and count <= SCANNED_ROWS and isinstance(self._index, faiss.IndexIVF):
            return self._scanned(queries, k, np.flatnonzero(allowed))
        selector = None if allowed is None else _selector(allowed)
        if self._coded:
            each = _REFINED_BITS if isinstance(self._index, faiss.IndexRaBitQ) else _REFINED
            found = self._search(queries, min(max(each * k, _MIN_REFINED), count), count, selector)
            return self._rescored(queries, k, found)
        wanted = min(k + _MARGIN, count)
        while True:
            found = self._search(queries, wanted, count, selector)
            # FAISS keeps any of equal scores; ask for more until the last of them is among those found.
            if wanted == count or (found.scores[:, -1] < found.scores[:, k - 1]).all():
                return ordered(found, k)
            wanted = min(8 * wanted, count)

    @classmethod
    def _clustered(cls, spec: SearchSpec, rows: Rows, progress: Progress) -> "VectorIndex":
        index: Any = _trained(spec, rows, progress)
        squares, sizes = np.zeros(index.nlist), np.zeros(index.nlist)
        for _, block in watched(rows.weighted_blocks(), progress):
            part = _padded(block, index.d)
            distances, lists = index.quantizer.search(part, 1)
            index.add_core(len(part), faiss.swig_ptr(part), None, faiss.swig_ptr(lists))
            squares += np.bincount(lists[:, 0], distances[:, 0].clip(min=0), index.nlist)
            sizes += np.bincount(lists[:, 0], minlength=index.nlist)
        return cls(index, rows, np.sqrt(squares / np.maximum(sizes, 1)).astype(np.float32))

    @classmethod
    def _of_bits(cls, rows: Rows, sizes: np.ndarray, progress: Progress) -> "VectorIndex":
        """Return an index of signs: of rows that have one size nothing is lost but what queries are rounded by.

        Codes are put together from the stored bits, as FAISS would find the same in float32 rows a hundred times more slowly. A column that is
        empty in every row has a bit all the same, and a query's 0 is rounded there as everywhere: half of the columns are flipped, so that these
        errors do not add up.
        """
        index: Any = faiss.IndexRaBitQ(rows.dim, faiss.METRIC_INNER_PRODUCT)
        # Signs of the rows themselves, not of what they differ by from a mean.
        index.train(np.zeros((1, rows.dim), np.float32))
        index.qb = _QUERY_BITS
        flips = _flips(rows.dim)
        if not _lays_out_codes(index):  # a version of FAISS that is not known
            for _, block in watched(rows.weighted_blocks(), progress):
                index.add(block * flips)
            return cls(index, rows)
        flipped, lengths = np.packbits(flips < 0, bitorder="little"), sizes * np.float32(rows.dim**0.5)
        for start, signs in watched(rows.signs(), progress):
            index.add_sa_codes(_codes(signs ^ flipped, lengths[start : start + len(signs)]))
        return cls(index, rows)

    @property
    def _coded(self) -> bool:
        return isinstance(self._index, faiss.IndexIVFPQ | faiss.IndexRaBitQ)

    def _search(self, queries: np.ndarray, k: int, count: int, selector: faiss.IDSelector | None) -> Ranked:
        """Return k of the allowed rows per query, by codes or by scores; clusters are added until there are k."""
        chosen = {} if selector is None else {"sel": selector}
        if not isinstance(self._index, faiss.IndexIVF):
            asked = queries if self._flips is None else _shortened(queries) * self._flips
            scores, rows = self._index.search(asked, k, params=faiss.SearchParameters(**chosen))
            return Ranked(rows, scores)
        padded = _padded(queries, self._index.d)
        probes = min(-(-self._index.nprobe * self._index.ntotal // count), self._index.nlist)
        while True:
            options = faiss.SearchParametersIVF(nprobe=probes, **chosen)  # type: ignore[call-arg]
            scores, rows = self._searched(padded, k, *self._visited(padded, probes), options)
            if probes == self._index.nlist or (rows >= 0).all():
                return Ranked(rows, scores)
            probes = min(2 * probes, self._index.nlist)

    def _searched(
        self,
        queries: np.ndarray,
        k: int,
        lists: np.ndarray,
        products: np.ndarray,
        options: faiss.SearchParametersIVF,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows (queries, k) found in the given clusters; FAISS's Python method takes no options."""
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        pointers = [faiss.swig_ptr(array) for array in (lists, products, scores, rows)]
        self._index.search_preassigned_c(len(queries), faiss.swig_ptr(queries), k, *pointers, False, options)
        return scores, rows

    def _visited(self, queries: np.ndarray, probes: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the clusters that may hold the best rows, and their centres' inner products, both (queries, probes)."""
        products = queries @ self._centres.T  # (queries, clusters)
        reach = np.linalg.norm(queries, axis=1, keepdims=True) * self._radii
        hopes = products + _DEVIATIONS / self._rows.dim**0.5 * reach
        lists = np.argsort(-hopes, axis=1, kind="stable")[:, :probes]
        return np.ascontiguousarray(lists), np.take_along_axis(products, lists, 1)

    @cached_property
    def _centres(self) -> np.ndarray:
        found: np.ndarray = self._index.quantizer.reconstruct_n(0, self._index.nlist)
        return found

    def _rescored(self, queries: np.ndarray, k: int, found: Ranked) -> Ranked:
        """Return the k best of what codes found, by their rows."""
        scores = np.full(found.rows.shape, -np.inf, np.float32)
        wanted = np.unique(found.rows[found.rows >= 0])  # FAISS finds nothing where it cannot compare
        step = rows_at_once(self._rows.dim)
        for start in range(0, len(wanted), step):
            part = wanted[start : start + step]
            read = self._rows.read_weighted(part)
            for line, query, rows in zip(scores, queries, found.rows, strict=True):
                inside = (rows >= part[0]) & (rows <= part[-1])
                line[inside] = read[np.searchsorted(part, rows[inside])] @ query
        return ordered(Ranked(found.rows, scores), k)

    def _scanned(self, queries: np.ndarray, k: int, numbers: np.ndarray) -> Ranked:
        scores = queries @ self._rows.read_weighted(numbers).T  # (queries, len(numbers))
        return ordered(Ranked(np.broadcast_to(numbers, scores.shape), scores), k)


def _codes(signs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return RaBitQ's codes of packed signs: the bits, a zero (the row's part in distances), and what the bits' inner product is multiplied with."""
    factors = np.stack([np.zeros_like(lengths), lengths], axis=1, dtype=np.float32)
    return np.concatenate([signs, factors.view(np.uint8)], axis=1)


def _flips(dim: int) -> np.ndarray:
    """Return signs (dim,) that columns of bits and of queries are multiplied with, half of each."""
    signs: np.ndarray = np.random.default_rng(0).permutation(np.resize(np.array([1, -1], np.float32), dim))
    return signs


def _lays_out_codes(index: Any) -> bool:
    """Return whether FAISS lays out codes as `_codes` does."""
    row = np.where(np.arange(index.d) % 3 == 0, np.float32(2), np.float32(-2))[None]
    own = _codes(np.packbits(row > 0, axis=1, bitorder="little"), np.array([2 * index.d**0.5], np.float32))
    found = index.sa_encode(row)
    bits = own.shape[1] - 8
    if found.shape != own.shape or not np.array_equal(found[:, :bits], own[:, :bits]):
        return False
    given, expected = (codes[:, bits:].copy().view(np.float32) for codes in (found, own))
    return np.allclose(given, expected, rtol=1e-5)


def _shortened(queries: np.ndarray) -> np.ndarray:
    """Return queries with a largest number of 1: squares of others may overflow, and their order of rows is the same."""
    largest = np.abs(queries).max(axis=1, keepdims=True, initial=0)
    found: np.ndarray = queries / np.where(largest > 0, largest, 1)
    return found


def _trained(spec: SearchSpec, rows: Rows, progress: Progress) -> Any:
    n = len(rows)
    lists = min(spec.lists or max(1, round(4 * n**0.5)), n)
    parts = min(spec.subquantizers or -(-rows.dim // _DIMS_PER_CODE), rows.dim)
    dim = -(-rows.dim // parts) * parts if spec.type == "ivfpq" else rows.dim
    centres = faiss.IndexFlatL2(dim)
    index: Any
    if spec.type == "ivfpq":
        index = faiss.IndexIVFPQ(centres, dim, lists, parts, spec.bits, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.niter = 10
        index.pq.cp.min_points_per_centroid = 1
        index.pq.cp.max_points_per_centroid = _TRAINING_ROWS_PER_LIST
    else:
        index = faiss.IndexIVFFlat(centres, dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 1
    index.cp.spherical = False
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _TRAINING_ROWS_PER_LIST
    count = min(lists * _TRAINING_ROWS_PER_LIST, _MAX_TRAINING_ROWS)
    index.train(_padded(_sample(rows, count, spec, progress), dim))
    index.nprobe = min(spec.probes or -(-lists // 3), lists)
    return index


def _sample(rows: Rows, count: int, spec: SearchSpec, progress: Progress) -> np.ndarray:
    """Return evenly spread rows; repeated where they are fewer than a code's values."""
    step = max(1, len(rows) // count)
    blocks = watched(rows.weighted_blocks(), progress)
    sample = np.concatenate([block[-start % step :: step] for start, block in blocks])
    codes = 2**spec.bits if spec.type == "ivfpq" else 1
    return np.tile(sample, (-(-codes // len(sample)), 1))


def _padded(rows: np.ndarray, dim: int) -> np.ndarray:
    """Return rows as FAISS takes them, with zeros up to `dim` columns."""
    if rows.shape[1] < dim:
        rows = np.pad(rows, ((0, 0), (0, dim - rows.shape[1])))
    return np.ascontiguousarray(rows, np.float32)


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
