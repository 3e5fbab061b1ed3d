"""The mended functions, and that each bug is told from its absence. Needs vLLM for the module's imports."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def fix():
    from verl_speculator.serving.v1 import rejection_sampler_fix

    return rejection_sampler_fix


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_values_are_repeated_and_replaced(dtype, fix) -> None:
    x = torch.tensor([3, 0, 7, 0], dtype=dtype)
    ends = torch.tensor([2, 3, 3, 5], dtype=torch.int32)
    assert fix.expand_batch_to_tokens(x, ends, 5, 0, 1).tolist() == [3, 3, 1, 1, 1]
    assert fix.expand_batch_to_tokens(x, ends, 5).tolist() == [3, 3, 0, 0, 0]
    assert x.tolist() == [3, 0, 7, 0]


def test_bug_is_told_from_its_absence(fix) -> None:
    def writes_to_a_copy(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
        return x.new_empty(num_tokens)

    def truncates(*args):
        return fix.expand_batch_to_tokens(*args).long().to(args[0].dtype)

    assert fix.expands_correctly(fix.expand_batch_to_tokens)
    assert not fix.expands_correctly(writes_to_a_copy)
    assert not fix.expands_correctly(truncates)


def test_no_drafts(fix) -> None:
    def takes_a_maximum(logits, ends, metadata):
        return logits / metadata.top_k.repeat_interleave(ends).max()

    logits, metadata = torch.zeros(2, 5), fix._TopKRequest(top_k=torch.tensor([2]))
    assert not fix.accepts_no_drafts(takes_a_maximum)
    mended = fix.skip_without_drafts(takes_a_maximum)
    assert fix.accepts_no_drafts(mended)
    assert mended(torch.zeros(0, 5), torch.tensor([0]), metadata).shape == (0, 5)
    assert torch.equal(
        mended(logits, torch.tensor([2]), metadata), takes_a_maximum(logits, torch.tensor([2]), metadata)
    )


@pytest.mark.parametrize("is_cpu", [True, False])
def test_only_a_cpu_with_the_bugs_is_mended(is_cpu: bool, fix, monkeypatch) -> None:
    from vllm import platforms
    from vllm.v1.sample import rejection_sampler

    def broken(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
        return torch.full((num_tokens,), -1.0)

    def stops(logits, cu_num_draft_tokens, sampling_metadata):
        raise RuntimeError("max() of nothing")

    monkeypatch.setattr(type(platforms.current_platform), "is_cpu", lambda self: is_cpu)
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", broken)
    monkeypatch.setattr(rejection_sampler, "apply_sampling_constraints", stops)
    names = ["expand_batch_to_tokens", "apply_sampling_constraints"]
    assert fix.apply_where_needed() == (names if is_cpu else [])
    assert (rejection_sampler.expand_batch_to_tokens is broken) is not is_cpu
    assert (rejection_sampler.apply_sampling_constraints is stops) is not is_cpu
    if is_cpu:
        assert fix.apply_where_needed() == [], "what is correct is left alone"
