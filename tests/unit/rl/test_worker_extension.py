"""Weights through verl's own sender and receiver over shared memory, into what vLLM serves."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from verl_speculator.errors import ConfigError
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig

pytest.importorskip("vllm")


class Policy(nn.Module):
    """Loads by name and refuses what it does not know, as vLLM's models do."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(16, 16)
        self.model.layers = nn.ModuleList()

    def load_weights(self, weights):
        with torch.no_grad():
            for name, tensor in weights:
                self.get_parameter(name).copy_(tensor)


def speculator(seed: int) -> MLPSpeculator:
    config = MLPSpeculatorConfig(input_hidden_dim=32, vocab_size=3000, n_predict=3, inner_dim=64)
    built = MLPSpeculator(config)
    built.reset_parameters(torch.Generator().manual_seed(seed))
    return built


@pytest.fixture
def worker(monkeypatch):
    """What vLLM makes of the extension, with a runner that serves a speculator."""
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    from verl_speculator.rl.worker_extension import SpeculatorWorkerExtension
    from verl_speculator.serving.served_chain import ServedChain

    class Worker(SpeculatorWorkerExtension):
        def __init__(self, vllm_config):
            self.device, self.local_rank = torch.device("cpu"), 0

    vllm_config = SimpleNamespace(
        speculative_config=None, quant_config=None, model_config=SimpleNamespace(dtype=torch.float32, quantization=None)
    )
    made = Worker(vllm_config=vllm_config)
    made.model_runner = SimpleNamespace(
        model=Policy(),
        vllm_config=vllm_config,
        drafter=SimpleNamespace(chain=ServedChain(speculator(0))),
        get_draft_model=lambda: None,
    )
    return made


def test_buckets_reach_policy_and_speculator_in_place(worker, tmp_path, monkeypatch):
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    handle = f"ipc://{tmp_path}/weights"
    monkeypatch.setattr(worker, "_get_zmq_handle", lambda: handle, raising=False)
    chain, policy = worker.model_runner.drafter.chain, worker.model_runner.model
    places = {name: tensor.data_ptr() for name, tensor in chain.state_dict().items()}
    new, weight = speculator(1), torch.randn(16, 16)
    sent = [
        ("model.weight", weight),
        ("model.bias", torch.zeros(16)),
        *((f"speculator.{name}", tensor) for name, tensor in new.file_views(new.state_dict()).items()),
    ]
    # The speculator alone is more than one bucket.
    sender = BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
    sending = threading.Thread(target=lambda: asyncio.run(sender.async_send_weights(iter(sent))), daemon=True)
    sending.start()
    worker.update_weights_from_ipc(use_shm=True)
    sending.join(timeout=20)

    torch.testing.assert_close(policy.model.weight.detach(), weight, rtol=0, atol=0)
    states, tokens = torch.randn(5, 32), torch.arange(5)
    assert torch.equal(chain.draft(states, tokens, 3), new.draft(states, tokens, 3))
    assert not torch.equal(chain.draft(states, tokens, 3), speculator(0).draft(states, tokens, 3))
    assert {name: tensor.data_ptr() for name, tensor in chain.state_dict().items()} == places


def test_a_rollout_without_a_speculator_is_refused_by_key(worker):
    worker.model_runner.drafter = None

    with pytest.raises(ConfigError, match=r"rollout\.engine_kwargs\.vllm\.speculative_config"):
        worker._update_weights([("speculator.emb.0.weight", torch.zeros(1))], None, False)


def test_a_drafter_of_vllms_own_is_refused_by_name(worker):
    worker.model_runner.drafter = None
    worker.model_runner.get_draft_model = lambda: Policy()

    with pytest.raises(ConfigError, match="vLLM drafts with a Policy by itself"):
        worker._update_weights([("speculator.fc.weight", torch.zeros(1))], None, False)
