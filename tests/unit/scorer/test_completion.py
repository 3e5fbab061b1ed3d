from __future__ import annotations

import pytest

from verl_speculator.errors import DataError
from verl_speculator.scorer.completion import Completions

STOP = 9


class Finisher:
    """Writes 1 more than the last token, up to 9."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        return [list(range(text[-1] + 1, STOP + 1)) for text in texts]


def test_each_text_is_finished_once():
    finisher = Finisher()
    completions = Completions(finisher, frozenset({STOP}), max_new_tokens=20)

    first = completions.answers([[0, 5, 6], [0, 5, 6], [0, 3]], [2, 2, 1])
    again = completions.answers([[0, 5, 6]], [2])

    assert first == [[6, 7, 8, 9], [6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9]]
    assert again == [[6, 7, 8, 9]]
    assert finisher.asked == [[0, 5, 6], [0, 3]]


def test_answers_that_have_ended_or_are_full_are_left_as_they_are():
    finisher = Finisher()
    completions = Completions(finisher, frozenset({STOP}), max_new_tokens=3)

    assert completions.answers([[0, 8, STOP], [0, 1, 2, 3, 4], [0, 4]], [1, 1, 1]) == [[8, STOP], [1, 2, 3], [4, 5, 6]]
    assert finisher.asked == [[0, 4]]


def test_a_text_shorter_than_its_prompt_is_refused():
    with pytest.raises(DataError, match="2 tokens is shorter than its prompt of 3"):
        Completions(Finisher(), frozenset(), 4).answers([[1, 2]], [3])
