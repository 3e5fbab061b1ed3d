"""A trained base goes back into the folder format, type and class that it came in."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from verl_speculator.engine.base_export import base_dtype, cast_weights, save_base_model
from verl_speculator.platforms import cpu


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    cpu.init_process_group()
    yield
    dist.destroy_process_group()


def vision_language_model() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = AutoConfig.for_model(
        "qwen2_vl",
        text_config={**text, "rope_parameters": rope, "rope_scaling": rope},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def test_a_vision_language_model_keeps_its_class(one_process, tmp_path) -> None:
    model = vision_language_model()
    # Not strictly valid, as some published settings are not: they are copied and not judged.
    settings = GenerationConfig(eos_token_id=[7, 9], do_sample=False)
    settings.temperature = 0.3
    model_config = SimpleNamespace(
        hf_config=model.config, trust_remote_code=False, generation_config=settings, get_processor=lambda: None
    )
    save_base_model(tmp_path, model, model_config, torch.bfloat16)
    folder = tmp_path / "huggingface"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [7, 9]
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16()), name


def test_the_type_that_a_configuration_names() -> None:
    assert base_dtype(AutoConfig.for_model("llama", dtype="bfloat16")) == torch.bfloat16
    assert base_dtype(AutoConfig.for_model("llama")) is None


def test_files_are_cast_one_by_one(tmp_path) -> None:
    from safetensors.torch import save_file

    parts = [{"a": torch.randn(3)}, {"b": torch.randn(2), "step": torch.tensor([3])}]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"model-{number}.safetensors")
    cast_weights(tmp_path, torch.bfloat16)
    for number, part in enumerate(parts):
        cast = load_file(tmp_path / f"model-{number}.safetensors")
        for name, tensor in part.items():
            assert torch.equal(cast[name], tensor.bfloat16() if tensor.is_floating_point() else tensor)
