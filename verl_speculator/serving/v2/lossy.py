"""What an acceptance rule needs of a step of vLLM's Model Runner V2. Checked on vLLM 0.32.0.

`GPUModelRunner.sample` has the hidden states, and calls the rejection sampler with the logits. What the requests have
asked for is known when they are added. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from verl_speculator.serving.compatibility import require_parameters, wrap
from verl_speculator.serving.lossy_requests import is_lossy, stop_tokens
from verl_speculator.serving.lossy_rows import ServedRule, VerifiedRows


class LossyStep:
    """A rule between the runner's logits and its rejection sampler; the runner's speculator holds it as `lossy`."""

    def __init__(self, rule: ServedRule, max_requests: int, device: torch.device) -> None:
        self.rule = rule
        self.stop_tokens = torch.full((max_requests, 1), -1, dtype=torch.long, device=device)
        self.is_lossy = torch.zeros(max_requests, dtype=torch.bool, device=device)
        self.hidden_states: Tensor | None = None

    def add_request(self, slot: int, params: Any) -> None:
        """`params` are its `SamplingParams`."""
        stops = stop_tokens(params)
        if len(stops) > self.stop_tokens.size(1):
            self.stop_tokens = F.pad(self.stop_tokens, (0, len(stops) - self.stop_tokens.size(1)), value=-1)
        padded = [*stops, *[-1] * (self.stop_tokens.size(1) - len(stops))]
        self.stop_tokens[slot] = torch.tensor(padded, device=self.stop_tokens.device)
        self.is_lossy[slot] = is_lossy(params)

    def rows(self, batch: Any, states: Any, invalid: Tensor | None) -> VerifiedRows:
        """Of the runner's `InputBatch`; `states` is its `RequestState`, `invalid` [R] as of `VerifiedRows`."""
        assert self.hidden_states is not None
        slots, ends = batch.idx_mapping[: batch.num_reqs], batch.cu_num_logits[: batch.num_reqs + 1].long()
        starts = ends[:-1]
        positions = batch.positions[batch.logits_indices]
        # Before a request's first own token vLLM fills its drafts with what it does not keep.
        has_begun = positions[starts] >= states.prefill_len.gpu[slots]
        return VerifiedRows(
            tokens=batch.input_ids[batch.logits_indices],
            positions=positions,
            hidden_states=self.hidden_states[batch.logits_indices],
            starts=starts,
            num_drafts=ends.diff() - 1,
            prompt_lengths=states.prompt_len.gpu[slots],
            stop_tokens=self.stop_tokens[slots],
            is_lossy=self.is_lossy[slots] & has_begun,
            invalid=invalid,
        )


def install() -> None:
    """Hook runner and rejection sampler; both pass through where a runner's speculator has no rule.

    Raises:
        UnsupportedEngineError: A method or parameter that the hooks need is not there.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    wrap(GPUModelRunner, "add_requests", _tell_requests)
    wrap(GPUModelRunner, "sample", _keep_states)
    wrap(RejectionSampler, "__call__", _relax_first)


def _tell_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    require_parameters(original, ["scheduler_output"])

    def add_requests(self: Any, scheduler_output: Any) -> Any:
        result = original(self, scheduler_output)
        lossy = getattr(self.speculator, "lossy", None)
        if lossy is not None:
            for request in scheduler_output.scheduled_new_reqs:
                lossy.add_request(self.req_states.req_id_to_index[request.req_id], request.sampling_params)
        return result

    return add_requests


def _keep_states(original: Callable[..., Any]) -> Callable[..., Any]:
    require_parameters(original, ["hidden_states"])

    def sample(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        lossy = getattr(self.speculator, "lossy", None)
        if lossy is not None:
            lossy.hidden_states = hidden_states
            self.rejection_sampler.verl_speculator = self.speculator
        return original(self, hidden_states, *args, **kwargs)

    return sample


def _relax_first(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = require_parameters(original, ["logits", "input_batch", "invalid_drafts"])

    def verify(self: Any, *args: Any, **kwargs: Any) -> Any:
        speculator = getattr(self, "verl_speculator", None)
        if speculator is not None:
            given = signature.bind(self, *args, **kwargs).arguments
            states = self.sampler.req_states
            speculator.relax(given["logits"], given["input_batch"], states, given.get("invalid_drafts"))
        return original(self, *args, **kwargs)

    return verify
