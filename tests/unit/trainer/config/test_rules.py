"""The words in which a value is refused, whatever is wrong with it."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.config import rules
from verl_speculator.trainer.config.compose import load_config

ON_MEGATRON = ["engine=megatron", "optim=megatron"]


@pytest.fixture(scope="module")
def defaults():
    return {"fsdp": load_config([]), "megatron": load_config(ON_MEGATRON)}


@pytest.fixture
def refused(defaults):
    """The sentence about one value put into the default configuration, past what the command line would let through."""

    def run(key: str, value, engine: str = "fsdp") -> str:
        config = defaults[engine].copy()
        OmegaConf.update(config, key, value, force_add=True)
        with pytest.raises(ConfigError) as caught:
            rules.check_values(config, 1)
        return str(caught.value)

    return run


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("data.train_batch_size", True, "a positive integer, got True"),
        ("data.train_batch_size", "8", "a positive integer, got '8'"),
        ("data.train_batch_size", None, "a positive integer, got None"),
        ("data.train_max_samples", 1.0, "an integer, got 1.0"),
        ("optim.lr", float("nan"), "a positive number, got nan"),
        ("optim.lr", float("inf"), "a positive number, got inf"),
        ("optim.lr", True, "a positive number, got True"),
        ("trainer.save_freq", True, "an integer or after_each_epoch, got True"),
        ("model.freeze_base_model", 0, "true or false, got 0"),
        ("model.lora_rank", False, "0, got False: "),
        ("engine.mixed_precision.param_dtype", "half", "bf16 or fp32, got 'half': float16 is not supported"),
    ],
)
def test_a_value_of_the_wrong_kind(refused, key, value, right) -> None:
    assert refused(key, value).startswith(f"{key} must be {right}")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("engine.expert_model_parallel_size", True, "1, got True: expert parallelism is not supported"),
        ("engine.qat.enable", 1, "false, got 1: quantization-aware training is not supported"),
        ("engine.vanilla_mbridge", 1, "null, true or false, got 1"),
    ],
)
def test_one_is_not_true(refused, key, value, words) -> None:
    assert refused(key, value, "megatron") == f"{key} must be {words}"


def test_a_value_that_must_be_given(refused) -> None:
    assert refused("data.train_files", "???") == "data.train_files must be given, as in data.train_files=..."
