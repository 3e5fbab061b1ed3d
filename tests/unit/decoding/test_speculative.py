"""Speculative decoding against `generate` of transformers, which knows nothing of ours."""

import pytest
import torch

from tests.unit.decoding.support import (
    KnowingDrafter,
    RandomDrafter,
    build_model,
    build_speculator,
    greedy_by_transformers,
    pad_left,
    random_prompts,
    sometimes_right,
)
from verl_speculator.decoding import NgramDrafter, generate, speculative_generate
from verl_speculator.errors import ConfigError, DataError

VOCAB_SIZE = 61
PROMPT_LENGTHS = (7, 1, 4, 11)
NUM_TOKENS = 22  # neither of the draft lengths below divides it evenly


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request):
    return build_model(request.param)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(VOCAB_SIZE, PROMPT_LENGTHS)


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[list[int]]:
    """Continuations longer than any test needs."""
    return greedy_by_transformers(model, prompts, NUM_TOKENS + 10)


class FakeGenerator:
    """Says that it lives on another device."""

    device = torch.device("meta")


def knowing_drafter(model, prompts, expected, n_predict, **kwargs) -> KnowingDrafter:
    return KnowingDrafter(model, [p + e for p, e in zip(prompts, expected, strict=True)], n_predict, **kwargs)


def test_plain_decoding_equals_transformers_on_mixed_lengths(model, prompts, expected):
    result = generate(model, *pad_left(prompts), max_new_tokens=NUM_TOKENS)

    assert result.tokens == [row[:NUM_TOKENS] for row in expected]
    assert result.num_target_forwards == NUM_TOKENS
    assert result.acceptance_length == 1.0
    assert result.num_drafts == [0] * len(prompts)


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 4])
def test_random_drafts_change_nothing(model, prompts, expected, num_draft_tokens):
    drafter = RandomDrafter(VOCAB_SIZE, n_predict=4)

    result = speculative_generate(
        model, drafter, *pad_left(prompts), max_new_tokens=NUM_TOKENS, num_draft_tokens=num_draft_tokens
    )

    assert result.tokens == [row[:NUM_TOKENS] for row in expected]


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 4])
def test_adversary_never_gets_a_token_through(model, prompts, expected, num_draft_tokens):
    drafter = knowing_drafter(model, prompts, expected, num_draft_tokens, num_right=lambda place: 0)

    result = speculative_generate(model, drafter, *pad_left(prompts), max_new_tokens=NUM_TOKENS)

    assert result.tokens == [row[:NUM_TOKENS] for row in expected]
    assert result.acceptance_length == 1.0
    assert result.num_target_forwards == NUM_TOKENS


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 4])
def test_oracle_gets_every_token_through(model, prompts, expected, num_draft_tokens):
    drafter = knowing_drafter(model, prompts, expected, num_draft_tokens)

    result = speculative_generate(model, drafter, *pad_left(prompts), max_new_tokens=NUM_TOKENS)

    rounds = -(-(NUM_TOKENS - 1) // (num_draft_tokens + 1))  # the prompt's forward brings the first token
    assert result.tokens == [row[:NUM_TOKENS] for row in expected]
    assert result.acceptance_length == num_draft_tokens + 1
    assert result.num_target_forwards == 1 + rounds
    assert result.num_drafts == [rounds] * len(prompts)


def test_rows_accept_different_numbers_of_tokens(model, prompts, expected):
    drafter = knowing_drafter(model, prompts, expected, 4, num_right=sometimes_right)

    result = speculative_generate(model, drafter, *pad_left(prompts), max_new_tokens=NUM_TOKENS)

    assert result.tokens == [row[:NUM_TOKENS] for row in expected]
    for row, prompt in enumerate(prompts):
        place, lengths = len(prompt) - 1, []
        while place - len(prompt) + 2 < NUM_TOKENS:
            lengths.append(sometimes_right(place))
            place += lengths[-1] + 1
        assert result.accepted_per_draft[row] == lengths
    assert result.counts.num_accepted_tokens == sum(result.num_accepted_tokens)


@pytest.mark.parametrize("drafter_name", ["oracle", "random"])
def test_generation_ends_with_the_stop_token(model, prompts, expected, drafter_name):
    stop = expected[0][9]
    other_stop = expected[2][5]
    drafter = (
        knowing_drafter(model, prompts, expected, 4)
        if drafter_name == "oracle"
        else RandomDrafter(VOCAB_SIZE, n_predict=4)
    )

    result = speculative_generate(
        model, drafter, *pad_left(prompts), max_new_tokens=NUM_TOKENS, eos_token_id=[stop, other_stop]
    )

    for tokens, row in zip(result.tokens, expected, strict=True):
        ends = [i for i, token in enumerate(row[:NUM_TOKENS]) if token in (stop, other_stop)]
        assert tokens == row[: ends[0] + 1 if ends else NUM_TOKENS]
    assert min(map(len, result.tokens)) < NUM_TOKENS


def test_stop_token_right_after_the_prompt_needs_one_forward(model, prompts, expected):
    drafter = RandomDrafter(VOCAB_SIZE, n_predict=3)

    result = speculative_generate(
        model, drafter, torch.tensor([prompts[0]]), max_new_tokens=NUM_TOKENS, eos_token_id=expected[0][0]
    )

    assert result.tokens == [[expected[0][0]]]
    assert (result.num_target_forwards, result.num_drafts, result.acceptance_length) == (1, [0], 1.0)


@pytest.mark.parametrize("rows", [1, 4])
def test_no_rejected_token_stays_in_the_cache(model, prompts, expected, rows):
    widths = []

    def watch(module, args, kwargs):
        widths.append(kwargs["past_key_values"].get_seq_length())

    drafter = knowing_drafter(model, prompts, expected, 4, num_right=sometimes_right)
    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        result = speculative_generate(model, drafter, *pad_left(prompts[-rows:]), max_new_tokens=NUM_TOKENS)
    finally:
        hook.remove()

    lengths = [len(prompt) for prompt in prompts[-rows:]]
    longest = [0, max(lengths)]
    for place in range(result.num_rounds - 1):
        gained = [(rounds[place] + 1 if place < len(rounds) else 0) for rounds in result.accepted_per_round]
        lengths = [length + new for length, new in zip(lengths, gained, strict=True)]
        going_on = [len(rounds) > place + 1 for rounds in result.accepted_per_round]
        longest.append(max(length for length, goes_on in zip(lengths, going_on, strict=True) if goes_on))
    assert result.tokens == [row[:NUM_TOKENS] for row in expected[-rows:]]
    assert widths == longest


@pytest.mark.parametrize("num_draft_tokens", [0, 4])
def test_a_draft_the_speculator_cannot_make_is_refused(model, prompts, num_draft_tokens):
    drafter = RandomDrafter(VOCAB_SIZE, n_predict=3)

    with pytest.raises(ConfigError, match="between 1 and 3, the most that this drafter can make"):
        speculative_generate(
            model, drafter, torch.tensor([prompts[0]]), max_new_tokens=4, num_draft_tokens=num_draft_tokens
        )


def test_unusable_inputs_are_refused(model, prompts):
    ids, mask = pad_left(prompts)

    with_hole = mask.clone()
    with_hole[:, -2] = 0

    for not_left in (mask.flip(1), with_hole):
        with pytest.raises(DataError, match="padded on the left"):
            generate(model, ids, not_left, max_new_tokens=4)
    with pytest.raises(DataError, match="shape of input_ids"):
        generate(model, ids, mask[:, 1:], max_new_tokens=4)
    with pytest.raises(DataError, match="at least one token"):
        generate(model, ids[:, :0], max_new_tokens=4)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        generate(model, ids, mask, max_new_tokens=0)
    with pytest.raises(ConfigError, match="generator is on meta and must be on cpu"):
        generate(model, ids, mask, max_new_tokens=4, generator=FakeGenerator())


@pytest.mark.parametrize("kind", ["mlp", "sum_rnn", "sum_lstm"])
@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3])
def test_every_kind_of_speculator_changes_nothing(model, prompts, expected, kind, num_draft_tokens):
    speculator = build_speculator(kind, model)

    result = speculative_generate(
        model, speculator, *pad_left(prompts), max_new_tokens=NUM_TOKENS, num_draft_tokens=num_draft_tokens
    )

    assert result.tokens == [row[:NUM_TOKENS] for row in expected]
    assert result.num_draft_tokens == num_draft_tokens


def test_copied_text_changes_nothing(model, prompts, expected):
    # Prompts that hold a part of their own continuation: some drafts are right, some wrong, some rows have none.
    seen = [prompt + row[:6] + prompt for prompt, row in zip(prompts, expected, strict=True)]
    continued = greedy_by_transformers(model, seen, NUM_TOKENS)

    result = speculative_generate(model, NgramDrafter(3), *pad_left(seen), max_new_tokens=NUM_TOKENS)

    assert result.tokens == continued
    drafted = [length for row in result.drafted_per_round for length in row]
    assert {0, 3} <= set(drafted)
    assert 0 < sum(result.num_accepted_tokens) < sum(drafted)
    assert result.counts.num_drafts == sum(length > 0 for length in drafted) < len(drafted) == result.counts.num_rounds


@pytest.mark.parametrize("drafter_name", ["oracle", "random", "ngram"])
def test_a_single_new_token_comes_from_the_prompts_forward(model, prompts, expected, drafter_name):
    drafter = {
        "oracle": knowing_drafter(model, prompts, expected, 3),
        "random": RandomDrafter(VOCAB_SIZE, n_predict=3),
        "ngram": NgramDrafter(3),
    }[drafter_name]

    result = speculative_generate(model, drafter, *pad_left(prompts), max_new_tokens=1)

    assert result.tokens == [row[:1] for row in expected]
    assert (result.num_target_forwards, result.num_rounds) == (1, 0)
    assert (result.times.draft, result.times.verify, result.acceptance_length) == (0.0, 0.0, 1.0)


def test_columns_of_nothing_but_padding_do_not_matter(model, prompts, expected):
    ids, mask = pad_left(prompts)
    wider = torch.cat([ids.new_full((4, 5), 9), ids], dim=1), torch.cat([mask.new_zeros(4, 5), mask], dim=1)

    result = speculative_generate(model, build_speculator("mlp", model), *wider, max_new_tokens=NUM_TOKENS)

    assert result.tokens == [row[:NUM_TOKENS] for row in expected]


def test_a_speculator_of_another_base_is_refused(model, prompts):
    ids = torch.tensor([prompts[0]])
    for changes, name in (({"vocab_size": 77}, "vocabulary size 77"), ({"hidden_size": 64}, "hidden size 64")):
        other = build_speculator("mlp", build_model("llama", **changes))
        with pytest.raises(ConfigError, match=f"the speculator was trained for {name} and the base model has"):
            speculative_generate(model, other, ids, max_new_tokens=4)
