"""The proposer that vLLM's `custom_class` method loads: it drafts with a `ChainSpeculator`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

from verl_speculator.errors import ConfigError
from verl_speculator.models import ChainSpeculator
from verl_speculator.serving import rejection_sampler_fix, runner_hook
from verl_speculator.serving.compatibility import moved
from verl_speculator.serving.draft_graphs import DraftGraphs
from verl_speculator.serving.drafting import last_accepted
from verl_speculator.serving.speculative_config_hook import ATTRIBUTE

logger = init_logger("vllm.verl_speculator")

GRAPHS_VARIABLE = "VERL_SPECULATOR_CUDA_GRAPHS"


class SpeculatorProposer(runner_hook.StepReceiver):
    """Drafts for all requests of a step at once; tokens and rows stay on the device.

    Under tensor parallelism every rank drafts with a whole copy of the speculator. vLLM's hidden states are the same on
    all ranks, and the drafts that count are those that the scheduler sends to all ranks: the ranks cannot part.
    """

    def __init__(self, vllm_config: Any) -> None:
        speculator = getattr(vllm_config.speculative_config, ATTRIBUTE, None)
        if speculator is None:
            raise ConfigError(
                "name a speculator folder as the model of the speculative config, not its proposer class."
            )
        self.served = speculator
        self.vllm_config = vllm_config
        self.vocab_size = vllm_config.model_config.get_vocab_size()

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Read the weights in the type of the base model; vLLM calls this when the base model is loaded."""
        runner_hook.install()
        rejection_sampler_fix.apply_where_needed()
        folder = self.served.folder(self.vllm_config.load_config.download_dir)
        device = _device()
        dtype = self.vllm_config.model_config.dtype
        # Not `model`: vLLM looks for the layers of a transformer in an attribute of that name.
        self.speculator = ChainSpeculator.from_pretrained(folder, dtype=dtype, device=device).eval()
        self.speculator.requires_grad_(False)
        self.draft: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = self.speculator.draft
        if os.environ.get(GRAPHS_VARIABLE) == "1" and device.type == "cuda":
            batch = self.vllm_config.scheduler_config.max_num_seqs
            drafts = self.vllm_config.speculative_config.num_speculative_tokens
            self.draft = DraftGraphs(self.speculator, batch, drafts).draft
        count = sum(parameter.numel() for parameter in self.speculator.parameters())
        logger.info(
            "Drafting with the %s in %s (%d heads, %.1f M parameters, %s).",
            *(type(self.speculator).__name__, folder, self.speculator.n_predict, count / 1e6, dtype),
        )

    @torch.inference_mode()
    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> torch.Tensor:
        """Drafts [B, k] int64 after the tokens that this step sampled; the lists on the CPU are not read."""
        step, sampled = self.step, self.sampled
        self.step = self.sampled = None
        if step is None or sampled is None or len(sampled) != len(sampled_token_ids):
            raise moved("its model runner no longer calls _sample and propose_draft_token_ids once in each step")
        if step.num_tokens == 0:
            return sampled.new_empty(len(sampled), 0)
        row, token = last_accepted(sampled, step.rows_end, self.vocab_size)
        return self.draft(step.hidden_states.index_select(0, row), token, step.num_tokens)


def _device() -> torch.device:
    from vllm.platforms import current_platform

    return torch.empty(0, device=current_platform.device_type).device
