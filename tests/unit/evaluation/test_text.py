from __future__ import annotations

import pytest

from verl_speculator.evaluation.text import visible


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
