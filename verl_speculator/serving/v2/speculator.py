"""Our speculator for vLLM's Model Runner V2. Checked on vLLM 0.32.0.

The runner loads it beside the base, hands it every step's hidden states, and has it captured with its own CUDA graphs.
What it reads of a step are tensors on the device, so it never waits for one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from verl_speculator.serving.acceptance_guard import AcceptanceGuard
from verl_speculator.serving.draft_loop import DraftLoop
from verl_speculator.serving.lossy_requests import RULE
from verl_speculator.serving.served_chain import Choose, ServedChain, load_served_chain

if TYPE_CHECKING:
    from verl_speculator.serving.v2.lossy import LossyStep

logger = init_logger("vllm.verl_speculator")


class ChainDrafter(DraftModelSpeculator):
    """Drafts for all requests of a step at once.

    Under tensor parallelism all ranks have the same hidden states and draft the same; the vocabulary matrix may lie in
    shards.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        # Here, not where weights are loaded: sleep at level 2 discards what is allocated there.
        self.loop = DraftLoop(self.max_num_reqs, self.num_speculative_steps, self.hidden_size, self.dtype, device)
        self.positions = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        self.steps = torch.arange(self.num_speculative_steps, device=device)
        self.guard = AcceptanceGuard(device)
        self.guard.is_done = get_tensor_model_parallel_rank() > 0  # one rank says it
        self.lossy: LossyStep | None = None
        # Of a request's slot, where `loop.logits` has what its drafts were chosen from; -1 where that is gone.
        self.drafted_rows = torch.full((self.max_num_reqs,), -1, device=device)

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        chain = load_served_chain(self.vllm_config, target_model, self.device)
        self.loop.draft_with(chain, None if self.draft_logits is None else self._sample)
        text = getattr(self.speculative_config, RULE, None)
        if text is not None:
            self._load_rule(text, chain, target_model)
        return chain

    def _load_rule(self, text: str, chain: ServedChain, target_model: nn.Module) -> None:
        from verl_speculator.serving.lossy_rows import load_served_rule
        from verl_speculator.serving.v2 import lossy

        lossy.install()
        rule = load_served_rule(text, target_model, self.num_speculative_steps, chain.read_state, self.device)
        self.lossy = lossy.LossyStep(rule, self.max_num_reqs, self.device)
        if rule.needs_draft_logits and self.draft_logits is None:
            self.loop.keep_logits(self.vocab_size)
            self.loop.draft_with(chain, self.loop.choose_and_keep)

    def relax(self, logits: Tensor, input_batch: Any, states: Any, invalid: Tensor | None) -> None:
        """Have the rule decide, before the `logits` [R, V] of a step's rows are verified with."""
        assert self.lossy is not None
        rows, slots = self.lossy.rows(input_batch, states, invalid), input_batch.idx_mapping[: input_batch.num_reqs]
        if self.lossy.rule.needs_draft_logits:
            if self.draft_logits is not None:
                rows = rows.with_draft_logits(self.draft_logits, slots)
            else:
                assert self.loop.logits is not None
                rows = rows.with_draft_logits(self.loop.logits, self.drafted_rows[slots])
        self.lossy.rule.apply(rows, logits)

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: there is no attention in it."""

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        # vLLM asks for captures that it throws away too, to see what they take.
        self.loop.graphs.clear()

    def capture(self) -> None:
        if self.device.type != "cuda":
            return
        try:
            self.loop.capture(self._numbers_of_tokens(), graph_capture(device=self.device))
        except Exception:
            logger.exception("The drafts could not be captured in CUDA graphs; they run without, which is slower.")

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        *,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **_: Any,
    ) -> Tensor:
        """Drafts [B, k] int64 for every request of the batch; those of an unfinished prompt have no meaning.

        Args:
            input_batch: Where each request's tokens lie among all of the step.
            last_hidden_states: [tokens of the step, H].
            num_sampled: [B]; 0 where the prompt is not complete.
            num_rejected: [B], of the drafts that this step verified.
            last_sampled: [most requests, 1], by a request's slot.
            num_speculative_tokens: At most k; vLLM cuts off what is beyond.
        """
        batch = input_batch.num_reqs
        wanted = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        if not dummy_run:
            drafted = input_batch.num_draft_tokens_per_req
            self.guard.count((num_sampled - 1).clamp(min=0), 0 if drafted is None else int((drafted > 0).sum()))
        if self.loop.logits is not None:
            self.drafted_rows.fill_(-1)
            slots = input_batch.idx_mapping[: batch if wanted else 0]
            self.drafted_rows[slots] = torch.arange(len(slots), device=slots.device)
        if wanted:
            # A request's last token that was kept is followed by those that were rejected.
            row = input_batch.query_start_loc[1 : batch + 1] - num_rejected - 1
            torch.index_select(last_hidden_states, 0, row, out=self.loop.hidden[:batch])
            torch.index_select(last_sampled.view(-1), 0, input_batch.idx_mapping[:batch], out=self.loop.token[:batch])
            if self.draft_logits is not None:
                torch.index_select(input_batch.positions, 0, row, out=self.positions[:batch])
                self._copy_request_inputs(batch, input_batch.idx_mapping, temperature, seeds, dummy_run)
            self.loop.run(batch, wanted)
        return self.loop.drafts[:batch]

    def compute_draft_logits(self, hidden_states: Tensor, spec_step_idx: int) -> Tensor:
        """The argument: `sample_draft` is given logits, of the type in which vLLM keeps them."""
        return hidden_states

    def _sample(self, batch: int) -> Choose:
        def sample(logits: Tensor, head_index: int) -> Tensor:
            assert self.draft_logits is not None
            # vLLM draws by a token's position: that of the last token, and one more for each draft.
            return self.sample_draft(
                logits.to(self.draft_logits.dtype),
                self.positions[:batch] + (1 + head_index),
                self.idx_mapping[:batch],
                self.temperature,
                self.seeds,
                self.steps[head_index],
                self.draft_logits,
            )

        return sample

    def _numbers_of_tokens(self) -> set[int]:
        """How many tokens vLLM may ask for: all heads', or what is set for each number of requests."""
        schedule = self.speculative_config.num_speculative_tokens_per_batch_size
        if schedule is None:
            return {self.num_speculative_steps}
        numbers = build_dynamic_sd_schedule_lookup(
            schedule, vllm_max_batch_size=self.max_num_reqs, vllm_num_speculative_tokens=self.num_speculative_steps
        )
        return set(numbers[1:]) - {0}
