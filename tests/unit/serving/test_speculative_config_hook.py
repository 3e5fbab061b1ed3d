"""What a speculator's configuration becomes on either of vLLM's model runners."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from tests.support.tiny import VOCAB_SIZE
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig
from verl_speculator.serving import speculative_config_hook as hook
from verl_speculator.serving.compatibility import UnsupportedEngineError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def speculator(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speculator")
    config = MLPSpeculatorConfig(input_hidden_dim=32, vocab_size=VOCAB_SIZE, n_predict=3, inner_dim=8)
    MLPSpeculator(config).save_pretrained(folder)
    return folder


def make_config(base_model: Path, speculator: Path, **settings: Any) -> Any:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig

    hook.install()
    target = ModelConfig(model=str(base_model), max_model_len=128, dtype="float32")
    return SpeculativeConfig(
        model=str(speculator), target_model_config=target, target_parallel_config=ParallelConfig(), **settings
    )


@pytest.fixture
def on_v2(monkeypatch) -> None:
    if not hook.has_v2():
        pytest.skip("this vLLM has no Model Runner V2 for us")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")


@pytest.fixture
def on_v1(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")


def test_on_v2_vllm_sees_a_method_without_a_model(on_v2, base_model, speculator) -> None:
    config = make_config(base_model, speculator, draft_sample_method="probabilistic")
    assert (config.method, config.num_speculative_tokens) == ("ngram_gpu", 3)
    assert config.prompt_lookup_min is config.prompt_lookup_max is None, "vLLM's own n-gram drafter would fail"
    assert not config.uses_draft_kv_cache()
    from vllm.config.speculative import NgramGPUTypes

    assert config.method in get_args(NgramGPUTypes), "with these vLLM schedules asynchronously"
    # As it reaches a worker.
    assert getattr(pickle.loads(pickle.dumps(config)), hook.ATTRIBUTE).folder() == speculator


def test_on_v1_it_is_a_class_of_ours_with_room_to_draft_at_the_end(on_v1, base_model, speculator) -> None:
    config = make_config(base_model, speculator, num_speculative_tokens=2)
    assert (config.method, config.model) == ("custom_class", hook.PROPOSER)
    assert config.target_model_config.max_model_len == 128
    assert config.draft_model_config.max_model_len >= 128 + 2
    with pytest.raises(ValueError, match="draft_sample_method has no effect on the speculator"):
        make_config(base_model, speculator, draft_sample_method="probabilistic")


def test_sleep_keeps_the_speculator_on_v2_and_warns_on_v1(monkeypatch) -> None:
    target = SimpleNamespace(enable_sleep_mode=True, sleep_preserve_parameter_names=["lm_head.*"], max_model_len=8)
    config = SimpleNamespace(target_model_config=target, method=hook.V2_METHOD, num_speculative_tokens=2)
    for _ in range(2):
        hook.finish(config)
        assert target.sleep_preserve_parameter_names == ["lm_head.*", "draft.*"]
    del target.sleep_preserve_parameter_names
    with pytest.raises(UnsupportedEngineError, match="ModelConfig has no sleep_preserve_parameter_names any more"):
        hook.finish(config)
    warned: list[str] = []
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: SimpleNamespace(warning_once=warned.append))
    config.method = hook.V1_METHOD
    hook.finish(config)
    assert len(warned) == 1
    assert warned[0].startswith("Sleep at level 2 discards the speculator")
