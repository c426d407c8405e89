from __future__ import annotations

import pytest

from ds_fp6.formats import DEFAULT_FORMATS, E2M2, E3M2, Format, Mode, all_formats


def test_e3m2_and_e2m2_are_the_published_formats():
    assert (E3M2.bits, E3M2.bias, E3M2.max, E3M2.smallest) == (6, 3, 28.0, 0.0625)
    assert len(set(E3M2.values)) == 63
    assert (E2M2.bits, E2M2.bias, E2M2.max, E2M2.smallest) == (5, 1, 7.0, 0.25)


@pytest.mark.parametrize("fmt", all_formats(), ids=str)
def test_values_are_ordered_symmetric_and_end_at_max(fmt):
    positive = fmt.values[: len(fmt.values) // 2]
    assert list(positive) == sorted(set(positive))
    assert positive[0] == 0 and positive[1] == fmt.smallest and positive[-1] == fmt.max
    assert list(fmt.values[len(positive) :]) == [-v for v in positive]


def test_every_format_of_3_to_8_bits_is_listed_once():
    names = [fmt.name for fmt in all_formats()]
    assert len(set(names)) == len(names) == sum(min(bits - 1, 5) for bits in range(3, 9))


@pytest.mark.parametrize("e, m", [(0, 2), (6, 1), (3, -1), (1, 0), (4, 4), (2, 6)])
def test_sizes_outside_the_range_are_refused(e, m):
    with pytest.raises(ValueError, match=f"{e}" if e in (0, 6) else "3 to 8 bits"):
        Format(e, m)


@pytest.mark.parametrize(
    "text, fmt, activation, group",
    [
        ("wf6af16", Format(3, 2), "float16", 0),
        ("wf6e3m2af16", Format(3, 2), "float16", 0),
        ("wf6abf16", Format(3, 2), "bfloat16", 0),
        ("wf5a16", Format(2, 2), None, 0),
        ("wf6e2m3a32", Format(2, 3), "float32", 0),
        ("wf6af16g128", Format(3, 2), "float16", 128),
        ("wf4e2m1af16g32", Format(2, 1), "float16", 32),
    ],
)
def test_modes_parse(text, fmt, activation, group):
    mode = Mode.parse(text)
    assert (mode.format, mode.activation, mode.group_size) == (fmt, activation, group)
    assert Mode.parse(mode.name) == mode
    assert Mode.parse(mode) is mode


def test_a_mode_is_named_by_its_shortest_spelling():
    assert Mode.parse("wf6e3m2af16").name == "wf6af16"
    for bits, fmt in DEFAULT_FORMATS.items():
        assert Mode.parse(f"wf{bits}a16").format == fmt


@pytest.mark.parametrize(
    "text",
    ["", "fp6", "wf6", "wf6a8", "wf9af16", "wf2af16", "wf6e3m3af16", "wf6e6m1af16", "wf6af16g0", "wi4af16",
     "wf6af16 ", "WF6AF16", "wf6e3af16", None, 6],
)
def test_unknown_modes_raise_with_the_value_and_the_grammar(text):
    with pytest.raises(ValueError, match="a mode is w f BITS") as error:
        Mode.parse(text)
    assert repr(text) in str(error.value)
