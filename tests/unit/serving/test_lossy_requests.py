"""Which requests a rule decides on, and what is refused beside one."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from verl_speculator.serving import lossy_requests

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def params(**settings: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, **settings})


@pytest.mark.parametrize(
    ("settings", "lossy"),
    [
        ({}, True),
        ({"extra_args": {}}, True),
        ({"extra_args": {"lossy": True}}, True),
        ({"extra_args": {"lossy": 1}}, True),
        ({"extra_args": {"lossy": False}}, False),
        ({"extra_args": {"lossy": 0}}, False),  # what false is over HTTP
        ({"extra_args": {"lossy": "false"}}, False),
    ],
)
def test_a_request_may_be_left_out(settings, lossy) -> None:
    assert lossy_requests.is_lossy(params(**settings)) is lossy


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"logprobs": 0},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"bad_words": ["no"]},
        {"allowed_token_ids": [1, 2]},
        {"min_tokens": 1},
    ],
)
def test_what_changes_or_tells_logits_is_refused(settings) -> None:
    """By the method that vLLM's own check of a request calls; the same without a rule, and when left out."""
    lossy_requests.install()
    ruled = SimpleNamespace(**{lossy_requests.RULE: "accept-all"}, enable_adaptive_verification=False)
    (name,) = settings
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=f"{name}=.* cannot be had with this server's acceptance rule"):
        params(**settings)._validate_spec_decode(ruled)
    params(**settings, extra_args={"lossy": False})._validate_spec_decode(ruled)
    params(**settings)._validate_spec_decode(SimpleNamespace(enable_adaptive_verification=False))
    params(max_tokens=5, stop_token_ids=[3])._validate_spec_decode(ruled)


def test_what_ends_a_request() -> None:
    one = params(stop_token_ids=[7, 8])
    one.update_from_generation_config({"eos_token_id": [2, 5]}, 2)
    assert sorted(lossy_requests.stop_tokens(one)) == [2, 5, 7, 8]
    one = params(ignore_eos=True)
    one.update_from_generation_config({"eos_token_id": [2, 5]}, 2)
    assert lossy_requests.stop_tokens(one) == []
