"""The proposer that vLLM's `custom_class` method loads: it drafts with a `ChainSpeculator`."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger

from verl_speculator.serving.acceptance_guard import AcceptanceGuard
from verl_speculator.serving.compatibility import moved
from verl_speculator.serving.draft_loop import DraftLoop
from verl_speculator.serving.served_chain import load_served_chain
from verl_speculator.serving.v1 import rejection_sampler_fix, runner_hook
from verl_speculator.serving.v1.drafting import last_accepted

logger = init_logger("vllm.verl_speculator")


class SpeculatorProposer(runner_hook.StepReceiver):
    """Drafts for all requests of a step at once; tokens and rows stay on the device.

    Under tensor parallelism every rank drafts. vLLM's hidden states are the same on all ranks, and the drafts that
    count are those that the scheduler sends to all ranks: the ranks cannot part.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        model, self.device = vllm_config.model_config, _device()
        self.vocab_size = model.get_vocab_size()
        self.num_drafts = vllm_config.speculative_config.num_speculative_tokens
        # Here, not where weights are loaded: sleep at level 2 discards what is allocated there.
        self.loop = DraftLoop(
            *(vllm_config.scheduler_config.max_num_seqs, self.num_drafts, model.get_hidden_size(), model.dtype),
            self.device,
        )
        self.guard = AcceptanceGuard(self.device)
        self.guard.is_done = get_tensor_model_parallel_rank() > 0  # one rank says it

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Read the weights in the type of the base model; vLLM calls this when the base model is loaded."""
        runner_hook.install()
        rejection_sampler_fix.apply_where_needed()
        # Not `model`: vLLM looks for the layers of a transformer in an attribute of that name.
        self.chain = load_served_chain(self.vllm_config, target_model, self.device)
        self.loop.draft_with(self.chain)
        if self.device.type == "cuda" and not self.vllm_config.model_config.enforce_eager:
            try:
                self.loop.capture({self.num_drafts}, graph_capture(device=self.device))
            except Exception:
                logger.exception("The drafts could not be captured in CUDA graphs; they run without, which is slower.")

    @torch.inference_mode()
    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> torch.Tensor:
        """Drafts [B, k] int64 after the tokens that this step sampled; the lists on the CPU are not read."""
        step, sampled = self.step, self.sampled
        self.step = self.sampled = None
        if step is None or sampled is None or len(sampled) != len(sampled_token_ids):
            raise moved("its model runner no longer calls _sample and propose_draft_token_ids once in each step")
        row, token, accepted = last_accepted(sampled, step.rows_end, self.vocab_size)
        self.guard.count(accepted, step.num_drafts)
        if step.num_tokens == 0:
            return sampled.new_empty(len(sampled), 0)
        batch = len(sampled)
        torch.index_select(step.hidden_states, 0, row, out=self.loop.hidden[:batch])
        self.loop.token[:batch].copy_(token)
        # vLLM keeps them for longer than until the next step.
        return self.loop.run(batch, step.num_tokens).clone()


def _device() -> torch.device:
    from vllm.platforms import current_platform

    return torch.empty(0, device=current_platform.device_type).device
