"""vLLM's V1 model runner hands its proposer the hidden states. Checked on vLLM 0.28.0 and 0.32.0.

A `custom_class` proposer gets token ids on the CPU and nothing else. The runner's `_sample` returns the sampled tokens
on the device, and its `propose_draft_token_ids` is given the hidden states they were sampled from and how many drafts
each request had. Both are noted on the proposer; the runner's own code then calls its `propose`. The runner of the CPU
is a subclass and needs nothing of its own. Hooks pass through where the proposer is not ours.

An acceptance rule, which is lossy, is put to work before `_sample`; a third hook notes what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from verl_speculator.serving.compatibility import moved, require_parameters, wrap
from verl_speculator.serving.v1.drafting import StepInputs

PROPOSE_PARAMETERS = ("scheduler_output", "sample_hidden_states", "spec_decode_metadata")


class StepReceiver:
    """A proposer that the hooks write to: the tokens [B, W] that a step sampled, and what they were sampled from."""

    sampled: Tensor | None = None
    step: StepInputs | None = None
    # What `_sample` is about to verify drafts with; None where nobody asks.
    verified_states: Tensor | None = None
    reads_verified_states = False

    def before_verification(self, runner: Any, logits: Tensor, metadata: Any) -> None:
        """Called with the logits that drafts are about to be verified with, which it may change."""


def install() -> None:
    """Hook the runner for proposers that are a `StepReceiver`.

    Raises:
        UnsupportedEngineError: a method or parameter that the hooks need is not there.
    """
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for name in ("cu_num_sampled_tokens", "num_draft_tokens"):
        if name not in SpecDecodeMetadata.__dataclass_fields__:
            raise moved(f"SpecDecodeMetadata has no {name} any more")

    def keep_sampled(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = require_parameters(original, ("logits", "spec_decode_metadata"))

        def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
            drafter = getattr(self, "drafter", None)
            if not isinstance(drafter, StepReceiver):
                return original(self, *args, **kwargs)
            given = signature.bind(self, *args, **kwargs).arguments
            if given["spec_decode_metadata"] is not None:
                drafter.before_verification(self, given["logits"], given["spec_decode_metadata"])
            output = original(self, *args, **kwargs)
            drafter.sampled = output.sampled_token_ids
            return output

        return sample

    def keep_states(original: Callable[..., Any]) -> Callable[..., Any]:
        def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
            drafter = getattr(self, "drafter", None)
            if isinstance(drafter, StepReceiver) and drafter.reads_verified_states:
                state = self.execute_model_state
                drafter.verified_states = None if state is None else state.sample_hidden_states
            return original(self, *args, **kwargs)

        return sample_tokens

    def keep_step(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = require_parameters(original, PROPOSE_PARAMETERS)

        def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
            drafter = getattr(self, "drafter", None)
            if isinstance(drafter, StepReceiver):
                given = signature.bind(self, *args, **kwargs).arguments
                metadata = given["spec_decode_metadata"]
                drafter.step = StepInputs(
                    hidden_states=given["sample_hidden_states"],
                    rows_end=None if metadata is None else metadata.cu_num_sampled_tokens,
                    num_tokens=given["scheduler_output"].num_spec_tokens_to_schedule,
                    num_drafts=0 if metadata is None else sum(map(bool, metadata.num_draft_tokens)),
                    requests=list(self.input_batch.req_ids),
                )
            return original(self, *args, **kwargs)

        return propose_draft_token_ids

    wrap(GPUModelRunner, "_sample", keep_sampled)
    wrap(GPUModelRunner, "propose_draft_token_ids", keep_step)
    wrap(GPUModelRunner, "sample_tokens", keep_states)
