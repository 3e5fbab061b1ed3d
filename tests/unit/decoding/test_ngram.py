import pytest
import torch

from tests.unit.decoding.reference import all_texts, prompt_lookup
from tests.unit.decoding.support import pad_left
from verl_speculator.decoding import DraftContext, NgramDrafter
from verl_speculator.errors import ConfigError


def propose(drafter: NgramDrafter, texts: list[list[int]], num_tokens: int) -> list[list[int]]:
    ids, mask = pad_left(texts)
    draft = drafter.propose(DraftContext(torch.zeros(len(texts), 1), ids, mask.sum(1)), num_tokens, None)
    return [row[:length] for row, length in zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True)]


@pytest.mark.parametrize(("max_ngram", "min_ngram"), [(3, 1), (2, 2), (5, 1), (1, 1)])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_every_short_text_is_continued_as_by_definition(max_ngram, min_ngram, num_tokens):
    texts = [text for length in range(1, 7) for text in all_texts(3, length)]

    found = propose(NgramDrafter(4, max_ngram=max_ngram, min_ngram=min_ngram), texts, num_tokens)

    assert found == [prompt_lookup(text, num_tokens, max_ngram, min_ngram) for text in texts]


def test_the_longest_ending_wins_over_an_earlier_shorter_one():
    text = [8, 3, 1, 7, 2, 3, 5, 6, 4, 7, 2, 3]

    assert propose(NgramDrafter(3), [text], 3) == [[5, 6, 4]]


def test_the_first_of_several_occurrences_is_copied():
    assert propose(NgramDrafter(3), [[4, 5, 1, 4, 5, 2, 4, 5]], 3) == [[1, 4, 5]]


def test_padding_is_no_text():
    # As a token, the padding would be an earlier occurrence of [0, 0].
    assert propose(NgramDrafter(3), [[0, 0], [1, 2, 3, 4, 5]], 3) == [[0], []]


@pytest.mark.parametrize("wrong", [{"max_draft_tokens": 0}, {"min_ngram": 0}, {"max_ngram": 2, "min_ngram": 3}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="at least 1"):
        NgramDrafter(**wrong)
