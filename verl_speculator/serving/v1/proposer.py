"""The proposer that vLLM's `custom_class` method loads: it drafts with a `ChainSpeculator`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger

from verl_speculator.serving.acceptance_guard import AcceptanceGuard
from verl_speculator.serving.compatibility import moved
from verl_speculator.serving.draft_loop import DraftLoop
from verl_speculator.serving.lossy_requests import RULE
from verl_speculator.serving.served_chain import load_served_chain
from verl_speculator.serving.v1 import rejection_sampler_fix, runner_hook
from verl_speculator.serving.v1.drafting import last_accepted

if TYPE_CHECKING:
    from verl_speculator.serving.lossy_rows import ServedRule

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
        self.rule: ServedRule | None = None
        self.drafted_requests: list[str] = []

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Read the weights in the type of the base model; vLLM calls this when the base model is loaded."""
        runner_hook.install()
        rejection_sampler_fix.apply_where_needed()
        # Not `model`: vLLM looks for the layers of a transformer in an attribute of that name.
        self.chain = load_served_chain(self.vllm_config, target_model, self.device)
        self.loop.draft_with(self.chain)
        self._load_rule(target_model)
        if self.device.type == "cuda" and not self.vllm_config.model_config.enforce_eager:
            try:
                self.loop.capture({self.num_drafts}, graph_capture(device=self.device))
            except Exception:
                logger.exception("The drafts could not be captured in CUDA graphs; they run without, which is slower.")

    def _load_rule(self, target_model: torch.nn.Module) -> None:
        text = getattr(self.vllm_config.speculative_config, RULE, None)
        if text is None:
            return
        from verl_speculator.serving.lossy_rows import load_served_rule

        self.rule = load_served_rule(text, target_model, self.num_drafts, self.chain.read_state, self.device)
        self.reads_verified_states = True
        if self.rule.needs_draft_logits:
            self.loop.keep_logits(self.vocab_size)
            self.loop.draft_with(self.chain, self.loop.choose_and_keep)

    def before_verification(self, runner: Any, logits: torch.Tensor, metadata: Any) -> None:
        if self.rule is None:
            return
        from verl_speculator.serving.v1.lossy import verified_rows

        if self.verified_states is None or len(self.verified_states) != len(logits):
            raise moved("its model runner no longer keeps the hidden states of a step in execute_model_state")
        rows = verified_rows(runner, metadata, self.verified_states)
        if self.loop.logits is not None:
            drafted = {name: row for row, name in enumerate(self.drafted_requests)}
            known = [drafted.get(name, -1) for name in runner.input_batch.req_ids]
            rows = rows.with_draft_logits(self.loop.logits, torch.tensor(known, device=self.device))
        self.rule.apply(rows, logits)
        self.verified_states = None

    @torch.inference_mode()
    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> torch.Tensor:
        """Drafts [B, k] int64 after the tokens that this step sampled; the lists on the CPU are not read."""
        step, sampled = self.step, self.sampled
        self.step = self.sampled = None
        if step is None or sampled is None or len(sampled) != len(sampled_token_ids):
            raise moved("its model runner no longer calls _sample and propose_draft_token_ids once in each step")
        row, token, accepted = last_accepted(sampled, step.rows_end, self.vocab_size)
        self.guard.count(accepted, step.num_drafts)
        self.drafted_requests = step.requests if step.num_tokens else []
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
