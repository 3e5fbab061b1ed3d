"""The states that hooks see are those that transformers gives out itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from verl_speculator.engine.hidden_states import (
    SeenStates,
    record_layers,
    record_lm_head_input,
    replace_lm_head,
)
from verl_speculator.errors import ConfigError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LAST = SeenStates.LAST


def make_model(family: str, **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **overrides})).eval()


def final_norm(model):
    decoder = model.get_decoder()
    return next(getattr(decoder, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(decoder, name))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "qwen3_moe"])
def test_states_after_every_layer(family: str) -> None:
    """Gemma scales its embeddings, GPT-2 adds positions to them, and mixtures of experts have lists in their layers."""
    model = make_model(family, **({"num_experts": 3, "num_experts_per_tok": 2} if family == "qwen3_moe" else {}))
    seen, ids = SeenStates(), torch.randint(1, 64, (2, 7))
    record_layers(model, [0, 1, 2, 3], seen)
    record_lm_head_input(model, seen)
    with torch.no_grad(), seen.recording():
        expected = model(ids, output_hidden_states=True).hidden_states
    *stream, after_norm = seen.take([0, 1, 2, 3, LAST])
    for layer_id in range(3):
        torch.testing.assert_close(stream[layer_id], expected[layer_id], rtol=0, atol=0)
    torch.testing.assert_close(after_norm, expected[3], rtol=0, atol=0)
    torch.testing.assert_close(final_norm(model)(stream[3]), expected[3], rtol=0, atol=0)
    assert not torch.equal(stream[3], expected[3])


def test_a_tap_gives_the_same_states_and_no_logits() -> None:
    model, ids = make_model("llama"), torch.randint(1, 64, (2, 7))
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[-1]
    seen = SeenStates()
    replace_lm_head(model, seen)
    with torch.no_grad(), seen.recording():
        logits = model(ids).logits
    assert logits.shape == (2, 7, 0)
    assert torch.equal(seen.take([LAST])[0], expected)


def test_layers_are_left_alone_where_nothing_is_asked_of_them() -> None:
    model = make_model("llama")
    record_layers(model, [], SeenStates())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_is_recorded_outside_or_kept_after() -> None:
    """Activation checkpointing runs the layers again in the backward pass."""
    model, ids = make_model("llama"), torch.randint(1, 64, (1, 5))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seen = SeenStates()
    record_layers(model, [1], seen)
    with seen.recording():
        model(ids)
    (state,) = seen.take([1])
    gradient = torch.autograd.grad(state.sum(), model.get_input_embeddings().weight)[0]
    assert gradient.abs().sum() > 0, "states of a base that trains have a gradient"
    with pytest.raises(RuntimeError, match="decoder layer 1"):
        seen.take([1])


def test_a_model_whose_layers_are_not_found() -> None:
    model = make_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ConfigError, match=r"the 5 decoder layers of a LlamaForCausalLM were not found"):
        record_layers(model, [1], SeenStates())
