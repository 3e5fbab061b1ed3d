"""What a base's forward returns against what its `lm_head` reads, on stand-ins for vLLM's model classes."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from torch import nn

from verl_speculator.serving.base_state import find_state
from verl_speculator.serving.compatibility import UnsupportedEngineError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

HIDDEN, VOCAB = 16, 40


class Base(nn.Module):
    """As vLLM's classes are: `compute_logits` ends in a logits processor, which applies the `lm_head`."""

    def __init__(self, scale: float = 1.0) -> None:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        super().__init__()
        self.model = nn.ModuleDict({"norm": nn.RMSNorm(HIDDEN), "layers": nn.ModuleList([nn.RMSNorm(HIDDEN)])})
        self.lm_head = nn.Linear(HIDDEN, VOCAB)
        with set_current_vllm_config(VllmConfig()):
            self.logits_processor = LogitsProcessor(VOCAB, scale=scale)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(self.lm_head, hidden_states)


class Late(Base):
    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(self.model["norm"](hidden_states))


class Divided(Base):
    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(hidden_states / 4)


class Wrapped(nn.Module):
    """A model of more than text has its language model inside."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = Late()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.language_model.compute_logits(hidden_states)


def state_of(base: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module | None:
    return find_state(base.to(dtype), HIDDEN, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_final_norm_in_compute_logits_is_found(dtype) -> None:
    base = Late()
    assert state_of(base, dtype) is base.model["norm"]
    assert state_of(Base(), dtype) is None


def test_inside_a_larger_model() -> None:
    base = Wrapped()
    assert state_of(base) is base.language_model.model["norm"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_quantised_lm_head_is_not_multiplied_with(dtype) -> None:
    base = Base()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().to(dtype), requires_grad=False)
    assert find_state(base, HIDDEN, torch.bfloat16, torch.device("cpu")) is None


def test_scaled_logits_are_no_other_state() -> None:
    assert state_of(Base(scale=0.25)) is None


def test_anything_else_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedEngineError, match=r"^Divided cannot be served with this speculator: its compute_log"
    ):
        state_of(Divided())


def test_a_state_from_before_the_last_layers_is_refused() -> None:
    base = Base()
    base.get_mtp_target_hidden_states = lambda: None
    with pytest.raises(UnsupportedEngineError, match="from before its last layers"):
        state_of(base)


def test_without_a_logits_processor_it_is_said(caplog) -> None:
    base = Base()
    base.compute_logits = base.lm_head.forward
    del base.logits_processor
    with caplog.at_level(logging.WARNING):
        assert state_of(base) is None
    assert "Base has no logits processor of vLLM" in caplog.text
