"""Filters against the same conditions in plain Python, value by value."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from attribution_core.data.filters import mask_of
from attribution_core.errors import InvalidInputError
from attribution_core.spec import Filter, Selector

FILTER: TypeAdapter[Filter] = TypeAdapter(Filter)
TYPES = {"whole": pa.int64(), "real": pa.float64(), "text": pa.string(), "flag": pa.bool_()}
COMPARISONS = {name: getattr(operator, {"gte": "ge", "lte": "le"}.get(name, name)) for name in
               ("eq", "ne", "gt", "gte", "lt", "lte")}  # fmt: skip
# Few different values, so that conditions match; and those where float64 and int64 part ways.
WHOLE = [0, 1, -1, 2, 2**53, 2**53 + 1, -(2**60) - 1, 2**63 - 1]
REAL = [0.0, -0.0, 1.0, 1.5, -2.5, 1e18, 5e-324]
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "whole": st.sampled_from(WHOLE),
    "real": st.sampled_from(REAL),
    "text": st.text("aé\N{FOX FACE}%_.", max_size=3),
    "flag": st.booleans(),
}
NUMBER = st.one_of(VALUES["whole"], VALUES["real"])
ASKED = {"whole": NUMBER, "real": NUMBER, "text": VALUES["text"], "flag": VALUES["flag"]}


@st.composite
def conditions(draw: st.DrawFn) -> dict[str, Any]:
    field = draw(st.sampled_from(sorted(TYPES)))
    ops = [*COMPARISONS, "in", "exists", *(["contains", "prefix"] if field == "text" else [])]
    op = draw(st.sampled_from(ops))
    if op == "in":
        return {"field": field, "op": op, "value": draw(st.lists(st.none() | ASKED[field], max_size=4))}
    if op == "exists":
        return {"field": field, "op": op, "value": draw(st.sampled_from([True, False, None]))}
    return {"field": field, "op": op, "value": draw(ASKED[field])}


def combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    parts = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        parts.map(lambda some: {"and": some}), parts.map(lambda some: {"or": some}), inner.map(lambda one: {"not": one})
    )


FILTERS = st.recursive(conditions(), combined, max_leaves=5)
ROWS = st.lists(st.fixed_dictionaries({name: st.none() | value for name, value in VALUES.items()}), max_size=12)


def holds(asked: dict[str, Any], row: dict[str, Any]) -> bool:
    match asked:
        case {"and": parts}:
            return all(holds(part, row) for part in parts)
        case {"or": parts}:
            return any(holds(part, row) for part in parts)
        case {"not": part}:
            return not holds(part, row)
    found, op, value = row[asked["field"]], asked["op"], asked["value"]
    if op == "exists":
        return (found is None) == (value is False)
    return found is not None and compared(found, op, value)


def compared(found: Any, op: str, value: Any) -> bool:
    if isinstance(found, float):
        # A column of float64 holds no number that a whole one would have to be rounded to.
        value = [None if one is None else float(one) for one in value] if op == "in" else float(value)
    others: dict[str, Callable[[Any, Any], bool]] = {
        "in": lambda a, b: a in b,
        "contains": lambda a, b: b in a,
        "prefix": lambda a, b: a.startswith(b),
    }
    return {**COMPARISONS, **others}[op](found, value)


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in TYPES.items()})


@given(rows=ROWS, asked=FILTERS)
@settings(max_examples=250, deadline=None)
def test_filters_mean_what_they_mean_in_python(rows: list[dict[str, Any]], asked: dict[str, Any]) -> None:
    found = mask_of(FILTER.validate_python(asked), table_of(rows))
    assert found.dtype == bool and found.shape == (len(rows),)
    assert found.tolist() == [holds(asked, row) for row in rows]


@pytest.mark.parametrize("field", ["whole", "real"])
@pytest.mark.parametrize("op", [*COMPARISONS, "in"])
def test_numbers_are_compared_exactly(field: str, op: str) -> None:
    """Where float64 and int64 part ways, at fractions, and at the two zeros."""
    rows = [{**dict.fromkeys(TYPES), field: one} for one in (None, *(WHOLE if field == "whole" else REAL))]
    for one in (*WHOLE, *REAL):
        asked = {"field": field, "op": op, "value": [one, None] if op == "in" else one}
        found = mask_of(FILTER.validate_python(asked), table_of(rows))
        assert found.tolist() == [holds(asked, row) for row in rows], asked


@given(rows=ROWS, asked=FILTERS)
@settings(max_examples=50, deadline=None)
def test_chunks_change_nothing(rows: list[dict[str, Any]], asked: dict[str, Any]) -> None:
    condition, table = FILTER.validate_python(asked), table_of(rows)
    chunked = pa.concat_tables([table.slice(start, 2) for start in range(0, len(rows), 2)]) if rows else table
    np.testing.assert_array_equal(mask_of(condition, chunked), mask_of(condition, table))


def test_a_null_matches_nothing_but_its_absence() -> None:
    table = pa.table({"text": pa.array([None, "a"])})

    def rows(asked: dict[str, Any]) -> list[bool]:
        return mask_of(FILTER.validate_python(asked), table).tolist()

    assert rows({"field": "text", "op": "ne", "value": "a"}) == [False, False]
    assert rows({"not": {"field": "text", "op": "eq", "value": "a"}}) == [True, False]
    assert rows({"field": "text", "op": "in", "value": [None]}) == [False, False]
    assert rows({"field": "text", "op": "exists", "value": False}) == [True, False]


@pytest.mark.parametrize(
    "asked",
    [
        {"field": "nothing", "op": "eq", "value": 1},
        {"field": "whole", "op": "eq", "value": "1"},
        {"field": "whole", "op": "eq", "value": True},
        {"field": "whole", "op": "gt", "value": 2**63},
        {"field": "whole", "op": "in", "value": [1, "a"]},
        {"field": "whole", "op": "prefix", "value": "1"},
        {"field": "real", "op": "lt", "value": "x"},
        {"field": "real", "op": "eq", "value": 10**400},
        {"field": "text", "op": "eq", "value": 1},
        {"field": "text", "op": "in", "value": [True]},
        {"field": "flag", "op": "eq", "value": 1},
        {"field": "flag", "op": "contains", "value": "t"},
        {"field": "vector", "op": "eq", "value": 1},
        {"field": "vector", "op": "in", "value": []},
        {"field": "vector", "op": "in", "value": [None]},
        {"field": "vector", "op": "prefix", "value": ""},
    ],
)
def test_what_cannot_be_compared_is_refused(asked: dict[str, Any]) -> None:
    row = {"whole": 1, "real": 1.0, "text": "a", "flag": True}
    table = table_of([row]).append_column("vector", pa.array([[1.0]]))
    for wanted in (asked, {"not": asked}, {"or": [{"field": "whole", "op": "exists"}, asked]}):
        with pytest.raises(InvalidInputError) as caught:
            mask_of(FILTER.validate_python(wanted), table)
        assert caught.value.pointer == "/filter"


@pytest.mark.parametrize(
    "asked",
    [
        {"field": "a", "op": "eq", "value": None},
        {"field": "a", "op": "eq", "value": [1]},
        {"field": "a", "op": "in", "value": 1},
        {"field": "a", "op": "exists", "value": "yes"},
        {"field": "a", "op": "contains", "value": 1},
        {"field": "a", "op": "like", "value": "a"},
        {"field": "a", "op": "eq", "value": float("nan")},
        {"field": "a", "op": "gt", "value": float("inf")},
        {"and": []},
        {},
    ],
)
def test_conditions_without_a_meaning_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FILTER.validate_python(asked)


def nested(depth: int, width: int) -> dict[str, Any]:
    leaf: dict[str, Any] = {"field": "a", "op": "exists"}
    asked: dict[str, Any] = {"and": [leaf] * width} if width > 1 else leaf
    for _ in range(depth - (2 if width > 1 else 1)):
        asked = {"not": asked}
    return asked


def test_filters_have_a_size_limit() -> None:
    Selector.model_validate({"where": nested(5, 32)})
    for depth, width in ((6, 1), (2, 33)):
        with pytest.raises(ValidationError):
            Selector.model_validate({"where": nested(depth, width)})
    with pytest.raises(ValidationError, match="conditions"):
        Selector.model_validate({"where": {"and": [nested(2, 20), nested(2, 20)]}})
