"""Speculative decoding against `generate` of transformers, which knows nothing of ours."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from verl_speculator.decoding import greedy_generate, speculative_generate
from verl_speculator.errors import ConfigError, DataError

VOCAB_SIZE = 61
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # with the usual 0.02 a random model repeats one token
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PROMPT_LENGTHS = (7, 1, 4, 11)
NUM_TOKENS = 22  # neither of the draft lengths below divides it evenly


class RandomDrafter:
    """Guesses that are almost always wrong, sometimes right by chance in a small vocabulary."""

    def __init__(self, vocab_size: int, n_predict: int) -> None:
        self.vocab_size, self.n_predict = vocab_size, n_predict
        self.generator = torch.Generator().manual_seed(0)

    def draft(self, hidden_states: Tensor, last_token: Tensor, num_tokens: int) -> Tensor:
        return torch.randint(self.vocab_size, (len(last_token), num_tokens), generator=self.generator)


class KnowingDrafter:
    """Knows each row's continuation and finds its place by the hidden state it is handed.

    `rows` are whole sequences (prompt and greedy continuation). The place is looked up among the hidden states of a
    forward over the whole sequence without a cache, so a wrong hidden state (another position, another row) draws the
    wrong continuation, and the tests see a lower acceptance. `num_right(place)` says how many drafts to get right.
    """

    def __init__(self, model, rows: list[list[int]], n_predict: int, num_right=lambda place: 1_000) -> None:
        self.rows, self.n_predict, self.num_right = rows, n_predict, num_right
        self.vocab_size = model.config.vocab_size
        with torch.no_grad():
            self.hidden = [model.get_decoder()(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]

    def draft(self, hidden_states: Tensor, last_token: Tensor, num_tokens: int) -> Tensor:
        return torch.stack([self._draft(h, int(t), num_tokens) for h, t in zip(hidden_states, last_token, strict=True)])

    def _draft(self, hidden: Tensor, last_token: int, num_tokens: int) -> Tensor:
        distances = [(states - hidden).abs().amax(-1).min(0) for states in self.hidden]
        row = min(range(len(distances)), key=lambda i: float(distances[i].values))
        place = int(distances[row].indices)  # of the token whose hidden state this is
        assert distances[row].values < 1e-4, "the hidden state belongs to no position of any sequence"
        assert self.rows[row][place + 1] == last_token, "the hidden state did not predict the last token"
        drafts = torch.tensor(self.rows[row][place + 2 : place + 2 + num_tokens])
        right = self.num_right(place)
        drafts[right:] = (drafts[right:] + 1) % self.vocab_size
        return drafts


def build_model(name: str):
    torch.manual_seed(3)
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request):
    return build_model(request.param)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[list[int]]:
    """Continuations longer than any test needs, each row alone and without padding, by transformers."""
    rows = []
    for prompt in prompts:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS + 10, do_sample=False)
        rows.append(output[0, len(prompt) :].tolist())
    assert all(len(set(row)) > 5 for row in rows), "a model that repeats itself cannot tell right from wrong"
    return rows


def pad_left(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def knowing_drafter(model, prompts, expected, n_predict, **kwargs) -> KnowingDrafter:
    return KnowingDrafter(model, [p + e for p, e in zip(prompts, expected, strict=True)], n_predict, **kwargs)


def test_greedy_equals_transformers_on_mixed_lengths(model, prompts, expected):
    result = greedy_generate(model, *pad_left(prompts), max_new_tokens=NUM_TOKENS)

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
    right = [0, 3, 1, 4, 2, 0, 4]
    drafter = knowing_drafter(model, prompts, expected, 4, num_right=lambda place: right[place % len(right)])

    result = speculative_generate(model, drafter, *pad_left(prompts), max_new_tokens=NUM_TOKENS)

    assert result.tokens == [row[:NUM_TOKENS] for row in expected]
    for row, prompt in enumerate(prompts):
        place, lengths = len(prompt) - 1, []
        while place - len(prompt) + 2 < NUM_TOKENS:
            lengths.append(right[place % len(right)])
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


def test_one_row_without_a_mask_keeps_no_rejected_slot(model, prompts, expected):
    lengths = []
    decoder_forward = model.get_decoder().forward

    def watch(*args, **kwargs):
        lengths.append(0 if kwargs["past_key_values"] is None else kwargs["past_key_values"].get_seq_length())
        return decoder_forward(*args, **kwargs)

    drafter = knowing_drafter(model, prompts, expected, 4, num_right=lambda place: place % 3)
    model.get_decoder().forward = watch
    try:
        result = speculative_generate(model, drafter, torch.tensor([prompts[0]]), max_new_tokens=NUM_TOKENS)
    finally:
        del model.get_decoder().forward

    gained = [length + 1 for length in result.accepted_per_draft[0]]
    assert result.tokens == [expected[0][:NUM_TOKENS]]
    assert lengths == [0] + [len(prompts[0]) + sum(gained[:i]) for i in range(len(gained))]


@pytest.mark.parametrize("num_draft_tokens", [0, 4])
def test_a_draft_the_speculator_cannot_make_is_refused(model, prompts, num_draft_tokens):
    drafter = RandomDrafter(VOCAB_SIZE, n_predict=3)

    with pytest.raises(ConfigError, match="between 1 and the speculator's n_predict=3"):
        speculative_generate(
            model, drafter, torch.tensor([prompts[0]]), max_new_tokens=4, num_draft_tokens=num_draft_tokens
        )


def test_unusable_inputs_are_refused(model, prompts):
    ids, mask = pad_left(prompts)

    with pytest.raises(DataError, match="padded on the left"):
        greedy_generate(model, ids, mask.flip(1), max_new_tokens=4)
    with pytest.raises(DataError, match="shape of input_ids"):
        greedy_generate(model, ids, mask[:, 1:], max_new_tokens=4)
    with pytest.raises(DataError, match="at least one token"):
        greedy_generate(model, ids[:, :0], max_new_tokens=4)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        greedy_generate(model, ids, mask, max_new_tokens=0)
