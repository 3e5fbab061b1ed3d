"""Attention sequence by sequence gives what each sequence gives alone, and its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from verl_speculator.engine import packed_attention
from verl_speculator.engine.packed_attention import NAME, PackedMask, attend_by_sequence

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
LENGTHS = [9, 1, 14, 1, 1, 5, 20]
WINDOWS = {
    "mistral": {"sliding_window": 6},
    # Every other layer slides.
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2},
    "gemma3_text": {"sliding_window": 6},
}


def make_model(family: str, **overrides):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def packed_inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None]}


def logits_and_gradients(model, forward) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = forward(model)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    return logits, list(torch.autograd.grad((logits.softmax(-1) * weights).sum(), list(model.parameters())))


def each_alone(model) -> torch.Tensor:
    ids = packed_inputs()["input_ids"][0].split(LENGTHS)
    return torch.cat([model(part[None], use_cache=False).logits[0] for part in ids])


def together(model) -> torch.Tensor:
    return model(**packed_inputs(), attention_mask=None, use_cache=False).logits[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_sequence_attends_to_itself(family: str, checkpointing: bool) -> None:
    model = make_model(family)
    expected, expected_gradients = logits_and_gradients(model, each_alone)
    assert "sequence by sequence" in attend_by_sequence(model)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logits, gradients = logits_and_gradients(model, together)
    torch.testing.assert_close(logits, expected)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_hold(family: str) -> None:
    """Some sequences are longer than the window, some are not."""
    model = make_model(family, **WINDOWS[family])
    expected, expected_gradients = logits_and_gradients(model, each_alone)
    without_window = make_model(family, **{**WINDOWS[family], "sliding_window": 100})
    assert not torch.allclose(each_alone(without_window), expected), "the windows matter here"
    attend_by_sequence(model)
    assert model.config._attn_implementation == NAME
    logits, gradients = logits_and_gradients(model, together)
    # Gemma's norms are float32 whatever the model is.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_no_mask_of_all_tokens_by_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is that of the sequences: no attention call sees more than one."""
    lengths = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, attn_mask=None, *args, **kwargs):
        assert attn_mask is None
        lengths.append(query.shape[2])
        return attention(query, key, value, attn_mask, *args, **kwargs)

    model = make_model("llama")
    attend_by_sequence(model)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    together(model)
    assert lengths == LENGTHS * SIZES["num_hidden_layers"]


def test_padded_batches_and_single_sequences_are_as_ever() -> None:
    plain, model = make_model("llama"), make_model("llama")
    attend_by_sequence(model)
    ids = torch.randint(1, 64, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}, {"input_ids": ids[:1]}):
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=0, atol=0)
    torch.manual_seed(0)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, plain.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))


def test_masks_that_see_ahead_stay_dense() -> None:
    """A block of an image's tokens, which see one another both ways."""
    packed = torch.tensor([[0, 0, 0, 0, 1, 1]])
    blocks = torch.tensor([[-1, 3, 3, -1, -1, -1]])

    def visible(batch, head, query, key):
        causal = (key <= query) & (packed[batch, query] == packed[batch, key])
        return causal | ((blocks[batch, query] == blocks[batch, key]) & (blocks[batch, query] >= 0))

    settings = {"batch_size": 1, "q_length": 6, "kv_length": 6, "allow_is_causal_skip": False}
    mask = packed_attention.packed_mask(**settings, mask_function=visible)
    assert isinstance(mask, torch.Tensor)
    assert mask[0, 0].tolist() == [[bool(visible(0, 0, q, k)) for k in range(6)] for q in range(6)]


def test_other_choices_are_left_alone() -> None:
    eager = make_model("llama")
    eager.set_attn_implementation("eager")
    assert "eager" in attend_by_sequence(eager)
    assert eager.config._attn_implementation == "eager"
    # transformers' own packed masks are wrong for these two, which must be said.
    for family, overrides in (("gemma2", {}), ("llama4_text", {"attention_chunk_size": 6, "num_local_experts": 2})):
        model = make_model(family, **overrides)
        assert "WARN" in attend_by_sequence(model)
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_for_all_sequences_at_once_is_called_as_it_asks(window: int | None) -> None:
    """Shapes and types only: it runs on accelerators."""
    pytest.importorskip("torch.nn.attention.varlen")
    mask = PackedMask([3, 5], window, "cpu")
    assert mask.cu_seqlens.tolist() == [0, 3, 8]
    assert mask.cu_seqlens.dtype == torch.int32
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(1, 4, 8, 16, dtype=torch.bfloat16)
        key, value = (torch.empty(1, 2, 8, 16, dtype=torch.bfloat16) for _ in range(2))
        output = packed_attention._varlen(query, key, value, mask, None)
    assert output.shape == (1, 8, 4, 16)


def test_where_the_kernel_is_used() -> None:
    half = torch.empty(1, dtype=torch.bfloat16)
    assert not packed_attention._has_varlen_kernel(half, 0.0), "it has none for CPU"


def test_the_lengths_that_a_mask_finds() -> None:
    masks = []
    original = packed_attention.packed_mask

    def recorded(*args, **kwargs):
        masks.append(original(*args, **kwargs))
        return masks[-1]

    model = make_model("llama")
    attend_by_sequence(model)
    packed_attention.AttentionMaskInterface.register(NAME, recorded)
    try:
        together(model)
    finally:
        packed_attention.AttentionMaskInterface.register(NAME, original)
    [mask] = masks
    assert mask.lengths == LENGTHS
    assert mask.window is None
    edges = list(itertools.accumulate(LENGTHS, initial=0))
    assert mask.cu_seqlens.tolist() == edges
