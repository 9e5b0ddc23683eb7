"""What a feature row is made of on disk: float32, float16, int8 or one bit per number.

All but float32 keep a float32 scale per row, since gradients of well-fitted examples are far below the smallest float16:

* `float16`: `x / s` with a largest entry of 1.
* `int8`: `round(127 x / s)`, s the largest magnitude.
* `binary`: the sign of each entry, eight to a byte from the lowest bit, and the scale `s = ‖x‖² / ‖x‖₁`. With it ⟨x, s·sign(x)⟩ = ‖x‖² exactly, so that
  the score of a query is right along x and its error is what the query has across x: in expectation, decoded scores have slope 1 on true ones.
  (The scale of least squared error, `mean |x|`, shrinks scores: by 2/π where entries are normal.)
  Source: Gao & Long 2024, RaBitQ, section 3.2, without its rotation: rows are random projections already.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Arrays = dict[str, np.ndarray]
RowType = Literal["float32", "float16", "int8", "binary"]
_LEVELS = 127
# Numbers decoded together: 16 MB.
_NUMBERS_AT_ONCE = 1 << 22
# Entries below this share of a row's root mean square count as zero, whose sign no rounding decides: they are positive.
_NOTHING = 1e-4


def encoded(rows: np.ndarray, dtype: RowType) -> Arrays:
    """Return how float32 rows (count, k) are stored: `rows`, and `scales` (count,) but for float32; for bits k as `columns` (1,) too."""
    if dtype == "float32":
        return {"rows": rows.astype(np.float32)}
    if dtype == "binary":
        return joined([signs(rows)], rows.shape[1])
    scales = np.abs(rows).max(axis=1, initial=0).astype(np.float32)
    divided = rows / np.where(scales > 0, scales, 1)[:, None]
    if dtype == "float16":
        return {"rows": divided.astype(np.float16), "scales": scales}
    return {"rows": np.rint(_LEVELS * divided).astype(np.int8), "scales": scales}


def rows_at_once(dim: int) -> int:
    """Return how many rows of `dim` numbers are decoded together."""
    return max(1, _NUMBERS_AT_ONCE // max(1, dim))


def signs(rows: np.ndarray) -> Arrays:
    """Return what bits are made of, of a part of rows (count, k): `signs` (count, ⌈k/8⌉), and each part's `lengths` and `sums` of magnitudes."""
    lengths = np.sqrt(np.einsum("ik,ik->i", rows, rows, dtype=np.float64))
    nothing = -_NOTHING / max(1, rows.shape[1]) ** 0.5 * lengths
    return {
        "signs": np.packbits(rows >= nothing[:, None], axis=1, bitorder="little"),
        "lengths": lengths,
        "sums": np.abs(rows).sum(axis=1, dtype=np.float64),
    }


def joined(parts: Sequence[Arrays], columns: int) -> Arrays:
    """Return how rows are stored of which `signs` gave each part, all of the same number of columns."""
    bits = [part["signs"] for part in parts]
    if columns % 8:
        whole = [np.unpackbits(part, axis=1, count=columns, bitorder="little") for part in bits]
        bits = [np.packbits(np.concatenate(whole, axis=1), axis=1, bitorder="little")]
    squares = np.sum([np.square(part["lengths"]) for part in parts], axis=0)
    sums = np.sum([part["sums"] for part in parts], axis=0)
    scales = squares / np.where(sums > 0, sums, 1)
    return {
        "rows": np.concatenate(bits, axis=1),
        "scales": scales.astype(np.float32),
        "columns": np.array([columns * len(parts)]),
    }


def decoded(rows: np.ndarray, scales: np.ndarray | None, columns: np.ndarray | None) -> np.ndarray:
    """Return rows (count, k) as float32, from what `encoded` gave."""
    if scales is None:
        return rows.astype(np.float32)
    if columns is not None:
        found = np.unpackbits(rows, axis=1, count=int(columns[0]), bitorder="little").astype(np.float32)
        found *= 2
        found -= 1
        found *= scales[:, None]
        return found
    per_level = scales / np.float32(_LEVELS) if rows.dtype == np.int8 else scales
    return rows.astype(np.float32) * per_level[:, None]
