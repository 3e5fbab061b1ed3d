from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_speculator.base_model import loading
from verl_speculator.base_model.loading import (
    explain_out_of_memory,
    load_target,
    load_tokenizer_and_config,
    pick_device,
    stop_tokens,
)
from verl_speculator.base_model.settings import LoadSettings
from verl_speculator.decoding import generate
from verl_speculator.errors import ConfigError

DEFAULTS = LoadSettings()
OWN_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

class OwnConfig(Qwen2Config):
    model_type = "own"

class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def base_copy(base_model, tmp_path) -> Path:
    return Path(shutil.copytree(base_model, tmp_path / "base"))


@pytest.fixture(scope="module")
def tokenizer(base_model):
    return AutoTokenizer.from_pretrained(base_model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int8"}, "--dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"device_map": "cpu"}, "--device-map must be one of auto, balanced, sequential, got 'cpu'"),
        ({"device_map": "auto", "device": "cuda:0"}, "--device-map .*: leave out --device=cuda:0"),
    ],
)
def test_mistake_names_its_flag(values, message) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        LoadSettings(**values)


def test_device_that_is_not_there() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("nonsense", "meta", "cuda:77"):
        with pytest.raises(ConfigError, match=f"^--device={name}"):
            pick_device(name)


def test_tokenizer_and_config(base_model, tmp_path) -> None:
    tokenizer, config = load_tokenizer_and_config(str(base_model), DEFAULTS)
    assert (config.hidden_size, config.vocab_size, len(tokenizer)) == (32, 384, 317)
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    assert load_tokenizer_and_config(str(base_model), DEFAULTS, template)[0].chat_template == "{{ messages }}"


def test_tokenizer_without_a_template(base_copy) -> None:
    (base_copy / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"^--base: .*no chat template.*--chat-template FILE"):
        load_tokenizer_and_config(str(base_copy), DEFAULTS)


def test_tokenizer_with_more_tokens_than_the_base_has_rows(base_copy) -> None:
    file = base_copy / "config.json"
    # Rows beyond the tokens are padding.
    for rows in (317, 390):
        file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": rows}))
        load_tokenizer_and_config(str(base_copy), DEFAULTS)
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 316}))
    with pytest.raises(ConfigError, match="has 317 tokens and the model's vocabulary only 316"):
        load_tokenizer_and_config(str(base_copy), DEFAULTS)


def test_what_transformers_cannot_read_is_one_sentence(base_copy) -> None:
    (base_copy / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(ConfigError, match=r"^--base: no \w+ can be read from '.*' \(.*\)$") as error:
        load_tokenizer_and_config(str(base_copy), DEFAULTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_chosen_attention_and_type(base_model, tokenizer, name) -> None:
    target = load_target(str(base_model), LoadSettings(attn_implementation=name, dtype="bfloat16"), tokenizer)
    assert target.model.config._attn_implementation == name
    assert target.dtype == torch.bfloat16 == target.model.lm_head.weight.dtype
    assert not target.model.training


QUANTIZATION = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def test_quantization_is_handed_on_as_it_is(base_model, tokenizer, monkeypatch) -> None:
    """As far as a machine without accelerator goes: what transformers is asked for."""
    asked = {}

    def from_pretrained(name, **settings):
        asked.update(settings)
        raise ValueError("asked")

    monkeypatch.setattr(loading, "pick_device", lambda name: torch.device("cuda:1"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for given in (QUANTIZATION, json.dumps(QUANTIZATION)):
        with pytest.raises(ConfigError, match="asked"):
            load_target(str(base_model), LoadSettings(quantization=given), tokenizer)
        assert asked.pop("quantization_config") == QUANTIZATION
        assert asked.pop("device_map") == {"": torch.device("cuda:1")}


def test_quantization_needs_an_accelerator(base_model, tokenizer) -> None:
    with pytest.raises(ConfigError, match="--quantization is for accelerators: on a CPU leave it out"):
        load_target(str(base_model), LoadSettings(quantization=QUANTIZATION, device="cpu"), tokenizer)
    for given in ("4bit", "[1]", '{"load_in_4bit": true}'):
        with pytest.raises(ConfigError, match="quantization must be for transformers"):
            LoadSettings(quantization=given)


def test_attention_that_there_is_not(base_model, tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"^--base: cannot load '.*' \(.*nonsense"):
        load_target(str(base_model), LoadSettings(attn_implementation="nonsense"), tokenizer)


def test_code_of_the_base_runs_only_when_it_is_trusted(base_copy, tokenizer) -> None:
    (base_copy / "own.py").write_text(OWN_CODE)
    file = base_copy / "config.json"
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "own", "auto_map": classes}))
    for load in (
        lambda settings: load_tokenizer_and_config(str(base_copy), settings),
        lambda settings: load_target(str(base_copy), settings, tokenizer).model,
    ):
        with pytest.raises(ConfigError, match=r"^--base: .* Python code of its own: .*--trust-remote-code$"):
            load(DEFAULTS)
        load(LoadSettings(trust_remote_code=True))
    model = load_target(str(base_copy), LoadSettings(trust_remote_code=True), tokenizer).model
    assert type(model).__name__ == "OwnForCausalLM"


@pytest.fixture
def device_maps(monkeypatch) -> list[str | None]:
    """The `device_map` of every model that is loaded."""
    seen = []
    load = AutoModelForCausalLM.from_pretrained

    def recorded(*args, device_map, **options):
        seen.append(device_map)
        return load(*args, device_map=device_map, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    return seen


def test_layers_are_spread_as_the_flag_says(base_model, tokenizer, device_maps) -> None:
    """With one device, all of them end up there, and what it decodes is the same."""
    prompt = torch.tensor([[5, 6, 7]])
    plain = load_target(str(base_model), DEFAULTS, tokenizer)
    spread = load_target(str(base_model), LoadSettings(device_map="balanced"), tokenizer)
    assert device_maps == [None, "balanced"]
    assert spread.device == plain.device == torch.device("cpu")
    assert spread.dtype == torch.float32
    outputs = [generate(target.model, prompt, max_new_tokens=8).tokens for target in (plain, spread)]
    assert outputs[0] == outputs[1]


def test_layers_are_spread_where_one_device_is_too_small(base_model, tokenizer, device_maps, monkeypatch) -> None:
    parameters = sum(p.numel() for p in load_target(str(base_model), DEFAULTS, tokenizer).model.parameters())

    def chosen(devices: int, free: float, **settings: str) -> str | None:
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
        monkeypatch.setattr(loading, "_free_memory", lambda: int(free))
        load_target(str(base_model), LoadSettings(**settings), tokenizer)
        return device_maps[-1]

    assert chosen(2, 4 * parameters) == "auto"
    assert chosen(2, 6 * parameters) is None
    assert chosen(2, 2 * parameters, dtype="bfloat16") == "auto"
    assert chosen(2, 4 * parameters, dtype="bfloat16") is None
    assert chosen(1, 4 * parameters) is None
    assert chosen(2, 4 * parameters, device="cpu") is None


def test_layers_that_would_be_brought_in_for_every_token_are_refused(base_model, tokenizer, monkeypatch) -> None:
    load = AutoModelForCausalLM.from_pretrained
    offload = lambda *args, device_map, **options: load(*args, **options).to("meta")  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offload)
    with pytest.raises(ConfigError, match=r"^--base: .* does not fit on the devices of this machine together"):
        load_target(str(base_model), LoadSettings(device_map="auto"), tokenizer)


def test_stop_tokens_are_all_that_anyone_names(base_model, tokenizer) -> None:
    model = load_target(str(base_model), DEFAULTS, tokenizer).model
    end = tokenizer.eos_token_id
    for named, expected in ((None, {end}), (7, {7, end}), ([7, 9, end], {7, 9, end})):
        model.generation_config.eos_token_id = named
        assert stop_tokens(model, tokenizer) == tuple(sorted(expected))


def real_cpu_error() -> None:
    torch.empty(1 << 60)


def accelerator_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("fail", [real_cpu_error, accelerator_error])
def test_running_out_of_memory_says_what_to_lower(fail) -> None:
    with (
        pytest.raises(ConfigError, match=r"^out of memory while decoding: lower this$"),
        explain_out_of_memory("decoding", "lower this"),
    ):
        fail()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory("decoding", "lower this"):
        raise RuntimeError("shapes do not match")
