"""Names and patterns of layers."""

import pytest

from attribution_core.layer_names import chosen_layers, is_exact, unmatched_layers

NAMES = ["embed", "layers.0.up", "layers.0.down", "layers.1.up", "lm_head"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["embed"], {"embed"}),
        (["layers.*.up"], {"layers.0.up", "layers.1.up"}),
        (["layers.*", "!*.down"], {"layers.0.up", "layers.1.up"}),
        (["!embed", "!lm_head"], {"layers.0.up", "layers.0.down", "layers.1.up"}),
        (["layers.[1-9].?p", "lm_head"], {"layers.1.up", "lm_head"}),
    ],
)
def test_patterns_choose(patterns: list[str], expected: set[str]) -> None:
    assert chosen_layers(patterns, NAMES) == expected


def test_patterns_that_match_nothing_are_named() -> None:
    assert unmatched_layers(["embed", "layer.*", "!head"], NAMES) == ["layer.*", "head"]


def test_a_name_with_brackets_means_itself_too() -> None:
    assert chosen_layers(["a[0]"], ["a[0]", "a0"]) == {"a[0]", "a0"}
    assert [is_exact(pattern) for pattern in ("a", "!a", "a*", "a[0]")] == [True, False, False, False]
