from __future__ import annotations

import pytest

from verl_speculator.reports.writing import short, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext é 日 🙂", "plain\n\ttext é 日 🙂"),
        ("a\x00b\x1b[31m\r", "a␀b␛[31m␍"),
        ("\x7f", "␡"),
        ("\x85", "\\x85"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800x", "\ufffdx"),
    ],
)
def test_control_characters_are_shown(text, shown) -> None:
    assert visible(text) == shown
    visible(text).encode("utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.0, "1"), (0.25, "0.25"), (123.4, "123"), (1234, "1,234"), (12345, "12.3k"), (2.5e6, "2.5M"),
     (0.00003, "3e-5"), (-0.5, "-0.5")],
)  # fmt: skip
def test_short_numbers(value, text) -> None:
    assert short(value) == text
