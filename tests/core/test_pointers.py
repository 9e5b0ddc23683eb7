"""Pointers to what is wrong are pointers into what was sent, whatever pydantic calls the ways it tried to read it."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from attribution_core.method_spec import MethodSpec
from attribution_core.pointers import MAX_NAME, pointer_to, steps_into
from attribution_core.spec import Filter, Selector


class Square(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["square"]
    side: int = Field(gt=0)
    square: "Square | None" = None


class Circle(BaseModel):
    type: Literal["circle"]
    radius: Annotated[float, Field(gt=0)]


class Drawing(BaseModel):
    shape: Annotated[Square | Circle, Field(discriminator="type")] | None = None
    shapes: list[Annotated[Square | Circle, Field(discriminator="type")]] = []
    size: Literal["fit"] | list[int] = "fit"
    names: dict[str, int] = {}
    sides: dict[int, int] = {}
    words: tuple[str, int] | None = None
    lower: str = ""

    @field_validator("lower", mode="before")
    @classmethod
    def _lowered(cls, value: Any) -> Any:
        return len(value) if isinstance(value, str) else value


CONDITION = {"field": "label", "op": "eq", "value": 3}
WRONG = {**CONDITION, "op": "like"}


def pointers(model: Any, sent: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(model).validate_python(sent)
    return list(dict.fromkeys(pointer_to(steps_into(sent, error)) for error in caught.value.errors()))


def resolve(document: Any, pointer: str) -> Any:
    """RFC 6901, section 4, in its own words."""
    for token in pointer.split("/")[1:]:
        name = token.replace("~1", "/").replace("~0", "~")
        document = document[int(name)] if isinstance(document, list) else document[name]
    return document


@pytest.mark.parametrize(
    ("model", "sent", "expected"),
    [
        (Drawing, [], [""]),
        (Drawing, "text", [""]),
        (Drawing, None, [""]),
        (Drawing, {"shape": {}}, ["/shape"]),
        (Drawing, {"shape": 7}, ["/shape"]),
        (Drawing, {"shape": {"type": "cube"}}, ["/shape"]),
        (Drawing, {"shape": {"type": "square", "side": 0}}, ["/shape/side"]),
        (Drawing, {"shape": {"type": "square"}}, ["/shape/side"]),
        (Drawing, {"shape": {"type": "square", "side": 1, "a/b~c": 2}}, ["/shape/a~1b~0c"]),
        (Drawing, {"shapes": {"0": {}}}, ["/shapes"]),
        (Drawing, {"shapes": [{"type": "circle", "radius": 1}, {"type": "circle", "radius": -1}]}, ["/shapes/1/radius"]),
        (Drawing, {"shapes": [{"type": "circle"}, 5]}, ["/shapes/0/radius", "/shapes/1"]),
        (Drawing, {"size": "huge"}, ["/size"]),
        (Drawing, {"size": [1, "x"]}, ["/size", "/size/1"]),
        (Drawing, {"size": {"fit": 1}}, ["/size"]),
        (Drawing, {"names": {"0": "x", "b": "y"}}, ["/names/0", "/names/b"]),
        (Drawing, {"sides": {"x": 1}}, ["/sides/x"]),
        (Drawing, {"words": ["a"]}, ["/words/1"]),
        (Drawing, {"lower": "its length is what is refused"}, ["/lower"]),
        # A field called like the tag of the union it is in.
        (Drawing, {"shape": {"type": "square", "side": 1, "square": {"type": "square"}}}, ["/shape/square/side"]),
        (Drawing, {"shape": {"type": "square", "side": 1, "square": 5}}, ["/shape/square"]),
        (Drawing, {"shape": {"type": "square", "square": {"type": "square", "side": 1}}}, ["/shape/side"]),
        (Drawing, {"shape": {"type": "square", "side": -1, "square": {"type": "square", "side": 1}}}, ["/shape/side"]),
        (Drawing, {"shape": {"type": "circle", "circle": {"radius": 1}}}, ["/shape/radius"]),
        (MethodSpec, {"type": "ekfac", "fisher": "nope"}, ["/fisher"]),
        (MethodSpec, {"type": "ekfac", "ekfac": {"fisher": "exact"}, "fisher": "nope"}, ["/fisher", "/ekfac"]),
        (MethodSpec, {"type": "posterior"}, ["/prior", "/queries"]),
        # Filters are judged as the kind they are, not as each that they are not.
        (Filter, 3, [""]),
        (Filter, {}, ["/field", "/op"]),
        (Filter, WRONG, ["/op"]),
        (Filter, {**CONDITION, "value": {"a": 1}}, ["/value"]),
        (Filter, {**CONDITION, "op": "in"}, [""]),
        (Filter, {"and": [CONDITION, WRONG]}, ["/and/1/op"]),
        (Filter, {"and": [{"or": [CONDITION, {"not": WRONG}]}]}, ["/and/0/or/1/not/op"]),
        (Filter, {"and": [{"and": [{"and": [{"and": WRONG}]}]}]}, ["/and/0/and/0/and/0/and"]),
        (Filter, {"not": {"not": {"not": {"field": "x"}}}}, ["/not/not/not/op"]),
        (Filter, {"or": []}, ["/or"]),
        (Filter, {"not": [3]}, ["/not"]),
        (Filter, {"condition": {"op": "eq"}}, ["/field", "/op", "/condition"]),
        (dict[str, list[Selector]], {"a": [{"where": WRONG}, {"rows": [0, -1]}, {}]}, ["/a/0/where/op", "/a/1/rows/1", "/a/2"]),
    ],
)  # fmt: skip
def test_pointers_lead_to_what_is_wrong(model: Any, sent: Any, expected: list[str]) -> None:
    found = pointers(model, sent)
    assert found == expected
    for pointer in found:
        try:
            resolve(sent, pointer)
        except (KeyError, IndexError):
            assert resolve(sent, pointer.rpartition("/")[0]) is not None, "a field is missing where there is something"


def test_the_walk_stays_short_in_deeply_repeated_names() -> None:
    """Every `and` below is a tag and a field: leaving either out in turn would be 2**60 ways."""
    sent: dict[str, Any] = dict(WRONG)
    for _ in range(60):
        sent = {"and": [sent]}
    assert pointers(Filter, sent) == ["/and/0" * 60 + "/op"]


def test_names_too_long_to_repeat_end_a_pointer_above_them() -> None:
    assert pointer_to(["a", "b" * MAX_NAME, 0]) == f"/a/{'b' * MAX_NAME}/0"
    assert pointer_to(["a", "b" * (MAX_NAME + 1), 0]) == "/a"
    assert pointer_to([]) == ""
    assert pointer_to(["", "~1"]) == "//~01"
