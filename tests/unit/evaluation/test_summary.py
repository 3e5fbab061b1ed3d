from __future__ import annotations

import pytest

from verl_speculator.evaluation.summary import paired_speedup, repeated_share


def test_repeated_share_counts_what_an_output_has_had_before() -> None:
    # 1 2 1 2 1 2 has the 4-grams 1212, 2121, 1212: one of three is a repeat.
    assert repeated_share([[1, 2, 1, 2, 1, 2]]) == pytest.approx(1 / 3)
    # 7 7 7 7 7 has 7777 twice; both outputs together: two repeats among five.
    assert repeated_share([[1, 2, 1, 2, 1, 2], [7] * 5]) == pytest.approx(2 / 5)


def test_outputs_do_not_repeat_each_other() -> None:
    assert repeated_share([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0


def test_outputs_shorter_than_a_gram_say_nothing() -> None:
    assert repeated_share([[1, 1, 1], []]) is None


def test_speedup_is_the_median_with_quartiles() -> None:
    speedup = paired_speedup([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (speedup.median, speedup.low, speedup.high) == (3.0, 2.0, 4.0)
    assert speedup.per_batch == [4.0, 1.0, 3.0, 2.0, 100.0]


def test_one_batch_has_no_spread() -> None:
    speedup = paired_speedup([1.2])
    assert (speedup.median, speedup.low, speedup.high) == (1.2, 1.2, 1.2)
