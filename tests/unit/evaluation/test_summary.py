from __future__ import annotations

import pytest

from tests.support.tiny import tiny_tokenizer
from verl_speculator.evaluation.summary import output_pieces, paired_speedup, repeated_share


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


class Letters:
    """Token i is the i-th letter."""

    def decode(self, tokens, clean_up_tokenization_spaces):
        return "".join(chr(ord("a") + token) for token in tokens)


def test_each_stretch_says_who_brought_it() -> None:
    # The prompt's forward brings a; round 1 drafts b c, the target adds d; round 2 accepts nothing, the target adds e.
    assert output_pieces(Letters(), range(5), [2, 0]) == [
        ("a", 0, False),
        ("bc", 1, True),
        ("d", 1, False),
        ("e", 2, False),
    ]


def test_tokens_past_the_end_are_not_there() -> None:
    assert output_pieces(Letters(), range(3), [3]) == [("a", 0, False), ("bc", 1, True)]
    assert output_pieces(Letters(), range(1), []) == [("a", 0, False)]
    assert output_pieces(Letters(), [], []) == []


def test_bytes_of_one_character_from_two_sides_stay_together(tokenizer) -> None:
    tokens = tokenizer("é€x", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 6  # bytes: two, three and one
    pieces = output_pieces(tokenizer, tokens, [1, 1, 0])
    assert "".join(text for text, _, _ in pieces) == "é€x"
    assert [text for text, _, _ in pieces] == ["é", "€", "x"]


@pytest.mark.parametrize("accepted", [[0] * 20, [3, 1, 0, 2, 4, 4, 4], [20]])
def test_pieces_add_up_to_the_text(tokenizer, accepted) -> None:
    text = "w1 w22 naïve <tag> w3\n日本 w4"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][:20]
    pieces = output_pieces(tokenizer, tokens, accepted)
    shown = sum(accepted) + len(accepted) + 1
    assert "".join(text for text, _, _ in pieces) == tokenizer.decode(tokens[:shown]).rstrip("\ufffd")


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
