from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from verl_speculator.losses import PackedHiddenStates

VOCAB_SIZE, HIDDEN_SIZE = 40, 12


@pytest.fixture(scope="session")
def base():
    """A Hugging Face model that has a configuration and no weights in memory."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        architectures=["Qwen2ForCausalLM"],
    )
    config.name_or_path = "some/base"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def packed() -> PackedHiddenStates:
    """Three sequences, of which one is too short to train every head."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 3, 12])
    total = int(lengths.sum())
    return PackedHiddenStates(
        hidden_states=torch.randn(total, HIDDEN_SIZE, generator=generator),
        input_ids=torch.randint(VOCAB_SIZE, (total,), generator=generator),
        loss_mask=(torch.rand(total, generator=generator) < 0.8).long(),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
    )
