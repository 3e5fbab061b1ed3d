"""Order and arithmetic of the paired measurement, with decoding replaced by what it would have returned."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from verl_speculator.base_model.loading import Target
from verl_speculator.data.chats import Chat
from verl_speculator.data.prompts import Prompt
from verl_speculator.decoding import DecodingResult, DecodingTimes, NgramDrafter
from verl_speculator.evaluation import measure as measuring
from verl_speculator.evaluation.measure import Drafting, by_prompt, measure
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.evaluation.summary import summarize_drafting, summarize_target
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig

CHAT = Chat("f", 0, [{"role": "user", "content": "q"}], None)
PROMPTS = [Prompt(CHAT, [1] * length, []) for length in (5, 2, 4, 3)]


class Letters:
    def decode(self, tokens, clean_up_tokenization_spaces=False):
        return "".join(chr(ord("a") + token) for token in tokens)


TARGET = Target(None, Letters(), (), torch.device("cpu"), torch.float32)


@pytest.fixture
def calls(monkeypatch):
    """Who decoded which prompts, in turn; plain decoding takes 2 seconds a row, the drafters 1 and 4."""
    seen = []
    seconds = {"plain": 2.0, "fast": 1.0, "slow": 4.0}

    def decode(target, prompts, way, settings, max_new_tokens, seed):
        name = "plain" if way is None else way.label
        seen.append((name, [len(prompt.prompt_ids) for prompt in prompts], max_new_tokens))
        rows = len(prompts)
        taken = seconds[name] * rows
        if way is None:
            plain = [[] for _ in prompts]
            result = DecodingResult([[0, 1, 2, 3]] * rows, 4, 0, plain, None, DecodingTimes(verify=3.0))
        else:
            tokens = [0, 1, 2, 3] if name == "fast" else [0, 1, 2, 9]
            times = DecodingTimes(draft=0.5, verify=1.5, other=0.25)
            result = DecodingResult([tokens] * rows, 3, 2, [[1, 0]] * rows, None, times)
        return result, taken

    monkeypatch.setattr(measuring, "_timed_decode", decode)
    return seen


def run(calls, batch_size: int):
    drafted = [Drafting("fast", None, 2), Drafting("slow", None, 2)]
    done = []
    settings = EvaluationSettings(batch_size=batch_size, max_new_tokens=32)
    measurement = measure(TARGET, drafted, PROMPTS, settings, lambda *what: done.append(what))
    return measurement, drafted, done


def test_order_changes_from_batch_to_batch_after_a_warm_up(calls) -> None:
    measurement, _, done = run(calls, batch_size=1)
    assert calls[:3] == [("plain", [2], 8), ("fast", [2], 8), ("slow", [2], 8)]
    assert [name for name, _, _ in calls[3:]] == [
        *("plain", "fast", "slow"),
        *("fast", "slow", "plain"),
        *("slow", "plain", "fast"),
        *("plain", "fast", "slow"),
    ]
    assert {tokens for _, _, tokens in calls[3:]} == {32}
    assert measurement.batches == [[1], [3], [2], [0]]  # shortest first
    assert done[0] == ("Decoding", 0, 4)
    assert done[-1] == ("Decoding", 4, 4)


def test_results_come_back_in_the_order_of_the_prompts(calls) -> None:
    measurement, drafted, _ = run(calls, batch_size=2)
    assert measurement.batches == [[1, 3], [2, 0]]
    rows = [
        (result is drafted[0].results[0], row) for result, row in by_prompt(measurement.batches, drafted[0].results)
    ]
    assert rows == [(False, 1), (True, 0), (False, 0), (True, 1)]


def test_numbers_of_a_drafter(calls) -> None:
    measurement, (fast, slow), _ = run(calls, batch_size=1)
    summary = summarize_drafting(measurement, fast, PROMPTS, TARGET, is_greedy=True)
    assert summary.acceptance_length.mean == 1.5  # 4 accepted in 8 drafts
    assert summary.acceptance_per_position == [0.5, 0.0]
    assert summary.accepted_lengths == [4, 4, 0]
    assert (summary.target_forwards, summary.target_forwards_plain) == (12, 16)
    assert summary.target_forwards_saved == 0.25
    assert (summary.identical_outputs, summary.num_identical) == (True, 4)
    assert summary.speedup.median == 2.0
    # Plain: 3 s in 3 steps. A round: 0.5 / 2 of drafting and 1.5 / 2 of verifying.
    assert (summary.costs.plain_step, summary.costs.draft, summary.costs.verify) == (1.0, 0.25, 0.75)
    assert summary.speedup_predicted == pytest.approx(1.5)
    assert summary.speedup_memory_bound is None
    fast.weight_share = 0.25
    weighed = summarize_drafting(measurement, fast, PROMPTS, TARGET, is_greedy=True)
    assert weighed.speedup_memory_bound == pytest.approx(1.5 / 1.25)
    assert summary.prompts[0].pieces == [("a", 0, False), ("b", 1, True), ("c", 1, False), ("d", 2, False)]

    other = summarize_drafting(measurement, slow, PROMPTS, TARGET, is_greedy=True)
    assert (other.identical_outputs, other.num_identical, other.speedup.median) == (False, 0, 0.5)
    sampled = summarize_drafting(measurement, slow, PROMPTS, TARGET, is_greedy=False)
    assert (sampled.identical_outputs, sampled.prompts[0].identical) == (None, None)


def test_numbers_of_the_target(calls) -> None:
    measurement, _, _ = run(calls, batch_size=2)
    health = summarize_target(measurement, 1.25, 10)
    assert (health.num_tokens, health.tokens_per_second, health.repeated_4grams) == (16, 2.0, 0.0)


def test_a_draft_is_weighed_by_the_weights_that_it_reads(base_model) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    sizes = model.config
    # Two layers of attention and MLP, and lm_head; embeddings are looked up, norms are no matrices.
    heads = sizes.num_attention_heads + 2 * sizes.num_key_value_heads + sizes.num_attention_heads
    layer = sizes.hidden_size * (heads * sizes.head_dim + 3 * sizes.intermediate_size)
    base_weights = sizes.num_hidden_layers * layer + sizes.hidden_size * sizes.vocab_size
    config = MLPSpeculatorConfig(
        vocab_size=sizes.vocab_size, input_hidden_dim=sizes.hidden_size, inner_dim=16, n_predict=3
    )
    target = Target(model, Letters(), (), torch.device("cpu"), torch.float32)
    two = measuring._weight_share(Drafting("two", MLPSpeculator(config), 2), target)
    draft_weights = 16 * sizes.hidden_size + 16 * 16 + 2 * 16 * sizes.vocab_size
    # What attention itself multiplies is no weight: a hundredth for a single token.
    assert two == pytest.approx(draft_weights / base_weights, rel=0.01)
    assert measuring._weight_share(Drafting("lookup", NgramDrafter(2), 2), target) == 0
    assert measuring._weight_share(Drafting("another", None, 2), target) is None
