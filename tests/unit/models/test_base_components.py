"""The classes that drafters are built from are those of transformers, and building a model of them works."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from verl_speculator.errors import ConfigError
from verl_speculator.models.base_components import ModelComponents, model_classes, override_components


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_parts_make_up_the_model(arch):
    """Layers, norm and rotary embedding put together by hand give what transformers' own model gives."""
    config = AutoConfig.for_model(
        arch, vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).model.eval()
    parts = model_classes[arch]
    layers = [parts.first_layer_class(config, 0), parts.decoder_layer_class(config, 1)]
    norm, rotary = parts.norm_class(16, eps=config.rms_norm_eps), parts.rotary_emb_class(config)
    for own, theirs in zip([*layers, norm], [*model.layers, model.norm], strict=True):
        own.load_state_dict(theirs.state_dict())
    ids = torch.arange(6)[None]
    hidden = model.embed_tokens(ids)
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    for layer in layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary(hidden, ids))
    torch.testing.assert_close(norm(hidden), model(ids).last_hidden_state)


def test_overriding_one_part_leaves_the_others():
    own = type("Own", (nn.Module,), {})
    assert override_components("llama", first_layer_class=own) == model_classes["llama"]._replace(first_layer_class=own)
    assert model_classes["llama"].first_layer_class is model_classes["llama"].decoder_layer_class
    assert list(model_classes) == ["llama", "qwen3"]
    assert ModelComponents._fields == ("first_layer_class", "decoder_layer_class", "norm_class", "rotary_emb_class")


def test_what_there_is_not():
    with pytest.raises(ConfigError, match=r"must be llama or qwen3, not 'gpt2'"):
        override_components("gpt2")
    with pytest.raises(ConfigError, match=r"no part 'first_layer'; it has first_layer_class, "):
        override_components("llama", first_layer=nn.Linear)
