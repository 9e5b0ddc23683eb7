"""Filters evaluated over a table's columns at once.

A null satisfies no condition but `exists: false`; `not` turns that round, so a null does satisfy `not (x eq 1)`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attribution_core.errors import InvalidInputError
from attribution_core.spec import And, Condition, Filter, Not, Or

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": pc.equal,
    "ne": pc.not_equal,
    "gt": pc.greater,
    "gte": pc.greater_equal,
    "lt": pc.less,
    "lte": pc.less_equal,
}


def mask_of(condition: Filter, table: pa.Table) -> np.ndarray:
    """Return which rows of a table satisfy a filter, (rows,) bool.

    Raises:
        InvalidInputError: if a field does not exist or a value has another type than its field.
    """
    match condition:
        case And(and_=parts):
            return np.asarray(np.logical_and.reduce([mask_of(part, table) for part in parts]))
        case Or(or_=parts):
            return np.asarray(np.logical_or.reduce([mask_of(part, table) for part in parts]))
        case Not(not_=part):
            return ~mask_of(part, table)
        case _:
            return _condition_mask(condition, table)


def _condition_mask(condition: Condition, table: pa.Table) -> np.ndarray:
    if condition.field not in table.column_names:
        known = ", ".join(sorted(table.column_names))
        raise InvalidInputError(
            f"there is no field {condition.field[:80]!r} to filter by; there are {known}", "/filter"
        )
    column = table[condition.field]
    if condition.op != "exists" and pa.types.is_list(column.type):
        raise InvalidInputError(f"field {condition.field} cannot be filtered by", "/filter")
    found = _evaluated(condition, column)
    return np.asarray(pc.fill_null(found, False).to_numpy(zero_copy_only=False), dtype=bool)


def _evaluated(condition: Condition, column: pa.ChunkedArray) -> pa.ChunkedArray:
    match condition.op:
        case "exists":
            valid = pc.is_valid(column)
            return pc.invert(valid) if condition.value is False else valid
        case "in":
            assert isinstance(condition.value, list)
            values = [_scalar(value, column.type, condition.field) for value in condition.value if value is not None]
            return pc.and_(pc.is_valid(column), pc.is_in(column, value_set=_value_set(values, column.type)))
        case "contains" | "prefix":
            if not pa.types.is_string(column.type):
                raise InvalidInputError(
                    f"op {condition.op!r} needs a text field, and {condition.field} is not one", "/filter"
                )
            matching = pc.match_substring if condition.op == "contains" else pc.starts_with
            return matching(column, pattern=condition.value)
        case _:
            value = _scalar(condition.value, column.type, condition.field)
            if pa.types.is_integer(column.type) and pa.types.is_floating(value.type):
                return _against_fraction(condition.op, column, math.floor(value.as_py()))
            return _COMPARISONS[condition.op](column, value)


def _against_fraction(op: str, column: pa.ChunkedArray, floor: int) -> pa.ChunkedArray:
    """Compare whole numbers with one between `floor` and `floor + 1`; as float64, large ones would not be themselves."""
    match op:
        case "eq":
            return pc.not_equal(column, column)
        case "ne":
            return pc.equal(column, column)
        case "gt" | "gte":
            return pc.greater(column, floor)
        case _:
            return pc.less_equal(column, floor)


def _scalar(value: Any, kind: pa.DataType, field: str) -> Any:
    """Return a value in the column's type, or a fraction for whole numbers, refusing what would be converted silently."""
    if pa.types.is_boolean(kind):
        fits = isinstance(value, bool)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    elif pa.types.is_string(kind):
        fits = isinstance(value, str)
    else:
        raise InvalidInputError(f"field {field} cannot be filtered by", "/filter")
    if not fits:
        raise InvalidInputError(f"field {field} is {kind}, and {value!r} is not", "/filter")
    if pa.types.is_floating(kind):
        return pa.scalar(float(value))
    return pa.scalar(int(value) if isinstance(value, float) and value.is_integer() else value)


def _value_set(values: list[Any], kind: pa.DataType) -> pa.Array:
    plain = [value.as_py() for value in values]
    if pa.types.is_integer(kind):
        # A fraction equals no whole number; an array of the column's own type cannot hold it.
        plain = [int(value) for value in plain if value == int(value)]
    elif pa.types.is_floating(kind):
        # 0 and -0 are equal everywhere but in Arrow's sets.
        plain += [-value for value in plain if value == 0]
    return pa.array(plain, kind)
