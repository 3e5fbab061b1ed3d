"""Models that place tokens, mask the past or hold it in other ways: the same tokens as transformers, or a refusal."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.unit.decoding.support import (
    KnowingDrafter,
    build_model,
    build_speculator,
    greedy_by_transformers,
    pad_left,
    random_prompts,
    sometimes_right,
)
from verl_speculator.decoding import generate, speculative_generate
from verl_speculator.errors import ConfigError

NUM_TOKENS = 21
PROMPT_LENGTHS = (13, 1, 6, 9)
WINDOW = 8  # less than a prompt and far less than a finished row
NO_MIX = {"layer_types": ["sliding_attention", "sliding_attention"]}
MIX = {"layer_types": ["sliding_attention", "full_attention"]}

MODELS = {
    "learned positions": ("gpt2", {"max_position_embeddings": 13 + NUM_TOKENS}),  # no room for drafts past the end
    "learned positions, shifted": ("opt", {"max_position_embeddings": 13 + NUM_TOKENS, "word_embed_proj_dim": 32}),
    "alibi from the mask": ("bloom", {"n_head": 4, "seed": 4}),
    "alibi from the slots": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "sliding window": ("mistral", {"sliding_window": WINDOW}),
    "some windows": ("gemma2", {"sliding_window": WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8} | MIX),
    "windows, two ropes": ("gemma3_text", {"sliding_window": WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8} | MIX),
    "qwen window": ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": True} | NO_MIX),
    "experts": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "shared heads": ("gpt_bigcode", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_output_is_that_of_transformers(name):
    family, changes = MODELS[name]
    model = build_model(family, **changes)
    prompts = random_prompts(61, PROMPT_LENGTHS)
    expected = greedy_by_transformers(model, prompts, NUM_TOKENS)
    limits = {"max_new_tokens": NUM_TOKENS}

    plain = generate(model, *pad_left(prompts), **limits)
    drafted = speculative_generate(model, build_speculator("mlp", model), *pad_left(prompts), **limits)

    assert plain.tokens == expected
    assert drafted.tokens == expected


@pytest.mark.parametrize("name", ["sliding window", "some windows", "windows, two ropes"])
def test_windows_stay_right_while_rows_accept_differently(name):
    family, changes = MODELS[name]
    model = build_model(family, **changes)
    prompts = random_prompts(61, PROMPT_LENGTHS)
    expected = greedy_by_transformers(model, prompts, NUM_TOKENS + 6)
    rows = [prompt + row for prompt, row in zip(prompts, expected, strict=True)]
    drafter = KnowingDrafter(model, rows, 4, num_right=sometimes_right)

    result = speculative_generate(model, drafter, *pad_left(prompts), max_new_tokens=NUM_TOKENS)

    assert result.tokens == [row[:NUM_TOKENS] for row in expected]
    assert {0, 2, 4} < {accepted for row in result.accepted_per_round for accepted in row}


REFUSED = {
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "intermediate_size": 64},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
    "recurrent_gemma": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "lru_width": 32},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_past_that_cannot_be_taken_back_is_refused(family):
    model = build_model(family, **REFUSED[family])

    with pytest.raises(ConfigError, match=r"cannot be decoded here: .*; models with a key-value cache .* can"):
        generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=4)


def test_an_encoder_decoder_is_refused():
    config = AutoConfig.for_model("t5", vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    model = AutoModelForSeq2SeqLM.from_config(config)

    with pytest.raises(ConfigError, match=r"T5ForConditionalGeneration cannot be decoded here: .*encoder-decoder"):
        generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=4)


def test_a_model_without_a_head_is_refused():
    model = build_model("llama").model

    with pytest.raises(ConfigError, match="a LlamaModel has no lm_head"):
        generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=4)


def test_the_model_is_left_as_it_was(tmp_path):
    model = build_model("llama")
    before = sum(len(module._forward_pre_hooks) for module in model.modules())

    generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=4)

    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == before
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.equal(model.lm_head.weight)
