"""vLLM's CPU build under the name that verl looks for, and its linear layers after a second load."""

from __future__ import annotations

import importlib.metadata
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def vllm_cpu():
    import verl  # noqa: F401 - loads our plugin

    from verl_speculator.platforms import vllm_cpu

    return vllm_cpu


def test_verl_finds_the_cpu_build_and_vllm_still_knows_what_it_is(vllm_cpu):
    from verl.workers.rollout import vllm_rollout
    from vllm.platforms import vllm_version_matches_substr

    cpu_build = importlib.metadata.version("vllm-cpu")
    assert importlib.metadata.version("vllm") == f"{cpu_build}+cpu"
    assert vllm_rollout.vllm_package_version == f"{cpu_build}+cpu"
    assert vllm_version_matches_substr("cpu")


def test_it_is_told_once_and_nothing_else_is_invented(vllm_cpu):
    before = list(sys.meta_path)
    vllm_cpu.ensure_distribution()
    assert sys.meta_path == before
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm-of-nobody")


def test_a_linear_layer_computes_with_weights_that_came_later(vllm_cpu, monkeypatch):
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    vllm_cpu.keep_linear_weights()
    layer = torch.nn.Linear(8, 16)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    states, weight = torch.randn(3, 8), torch.randn(16, 8)
    with torch.no_grad():
        layer.weight.copy_(weight)
    torch.testing.assert_close(layer.cpu_linear(states, layer.weight, None), states @ weight.T)


def test_what_is_no_matrix_is_left_to_vllm(vllm_cpu, monkeypatch):
    from vllm.model_executor.layers import utils

    seen = []
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", lambda layer, remove_weight: seen.append(layer))
    vllm_cpu.keep_linear_weights()
    layer = SimpleNamespace(weight=torch.zeros(2, 3, 4))
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert seen == [layer]
