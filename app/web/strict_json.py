"""JSON bodies parsed strictly, in one place, before anything looks at them.

What is checked of each value is checked again by nothing else, so it must stay cheap: a body has up to a million of them.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from app.errors import FieldProblem, InvalidRequest
from attribution_core.pointers import Step, pointer_to
from attribution_core.strict_json import refuse_constant, without_repeats

MAX_DEPTH = 64
MAX_VALUES = 1_000_000
MAX_KEYS = 100_000  # of all objects together: each may be an unknown field, to be reported
# What stands between quotes holds no values. Possessive, and not to fail where a quote is missing: one pass, whatever the body.
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


def parse_strictly(body: bytes, at: tuple[Step, ...] = ()) -> Any:
    """Return the value of a JSON body, or of a part of a form that is at `at` in it.

    Raises:
        InvalidRequest: for anything that is not plain JSON: repeated keys, NaN, numbers beyond 64 bits or float range,
            NUL characters, lone surrogates, deep nesting, more than a million values or 100,000 keys.
    """
    if _at_most(body) > MAX_VALUES and _at_most(_TEXT.sub(b"", body)) > MAX_VALUES:
        raise InvalidRequest(f"The body has more than {MAX_VALUES:,} values.")
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_counting_keys(),
            parse_constant=refuse_constant,
            parse_float=_float,
        )
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not UTF-8.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from None
    _check(value, at, 0)
    return value


def _at_most(body: bytes) -> int:
    """Return how many values a body has at most, by the commas and brackets before each."""
    return sum(map(body.count, (b",", b"[", b"{")))


def _counting_keys() -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    total = 0

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal total
        total += len(pairs)
        if total > MAX_KEYS:
            raise ValueError(f"it has more than {MAX_KEYS:,} keys")
        return without_repeats(pairs)

    return made


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _check(value: Any, place: tuple[Step, ...], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _refused(place, "nested too deeply")
    match value:
        case dict():
            for key, entry in value.items():
                _check_text(key, place)
                if not isinstance(entry, float):
                    _check(entry, (*place, key), depth + 1)
        case list():
            for number, entry in enumerate(value):
                if not isinstance(entry, float):
                    _check(entry, (*place, number), depth + 1)
        case str():
            _check_text(value, place)
        case int():
            if not -(2**63) <= value < 2**63:
                raise _refused(place, "a whole number beyond 64 bits")


def _check_text(text: str, place: tuple[Step, ...]) -> None:
    if "\x00" in text:
        raise _refused(place, "text with a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refused(place, "text with a lone surrogate, which is not valid Unicode") from None


def _refused(place: tuple[Step, ...], detail: str) -> InvalidRequest:
    return InvalidRequest(f"The body has {detail}.", [FieldProblem(pointer=pointer_to(place), detail=detail)])
