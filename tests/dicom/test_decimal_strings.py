"""Lists of decimal numbers are parsed as Python's float() parses them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuprep.dicom.decimal_strings import parse_decimals

DIGITS = "0123456789"


@st.composite
def ordinary_numbers(draw: st.DrawFn) -> str:
    """Draw a number of up to 15 digits, at most eight of them before the point."""
    before = draw(st.text(DIGITS, max_size=8))
    after = draw(st.text(DIGITS, min_size=not before, max_size=15 - len(before)))
    point = "." if after else draw(st.sampled_from(["", "."]))
    return draw(st.sampled_from(["", "-"])) + before + point + after


@given(st.lists(st.lists(ordinary_numbers(), min_size=1, max_size=20), min_size=1, max_size=5))
def test_ordinary_numbers_are_those_of_float(numbers: list[list[str]]) -> None:
    found = parse_decimals(["\\".join(part).encode() for part in numbers], math.inf)
    for values, texts in zip(found, numbers, strict=True):
        assert values is not None
        assert values.tobytes() == np.array([float(text) for text in texts]).tobytes()  # -0 is not 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.sampled_from([".0f", ".2f", ".4f", ".8f", "g", ""]))
def test_numbers_as_programs_write_them_are_those_of_float(numbers: list[float], written: str) -> None:
    texts = [format(number, written) for number in numbers]
    (values,) = parse_decimals(["\\".join(texts).encode()], 1e6)
    if values is not None:
        assert values.tobytes() == np.array([float(text) for text in texts]).tobytes()
    elif written in (".0f", ".2f", ".4f", ".8f"):
        assert abs(float(max(texts, key=lambda text: abs(float(text))))) >= 1e6


@given(st.lists(st.text("0123456789.-+eE \\\0x/:", max_size=12), min_size=1, max_size=4))
def test_any_text_is_parsed_as_by_float_or_left(texts: list[str]) -> None:
    for values, text in zip(parse_decimals([t.encode() for t in texts], math.inf), texts, strict=True):
        if values is not None:
            assert values.tobytes() == np.array([float(part) for part in text.split("\\")]).tobytes()


@pytest.mark.parametrize(
    "odd", ["", "-", ".", "-.", "+1", "1e3", " 1", "1 ", "1\0", "1.2.3", "--1", "1-", "1:", "1/", "123456789", "1" * 40]
)
def test_a_text_with_an_unusual_number_is_left_and_others_are_parsed(odd: str) -> None:
    before, middle, after = parse_decimals([b"1\\-2.5", f"3\\{odd}\\4".encode(), b"5.25"], 1e6)
    assert middle is None
    assert before is not None
    assert after is not None
    assert (before.tolist(), after.tolist()) == ([1, -2.5], [5.25])


def test_a_text_with_a_number_beyond_the_largest_is_left() -> None:
    assert [values is None for values in parse_decimals([b"1000000\\0", b"-1000000.1\\0", b"1000001"], 1e6)] == [
        False,
        True,
        True,
    ]
