"""What an acceptance rule needs of a step of vLLM's V1 model runner. Checked on vLLM 0.28.0 and 0.32.0.

`_sample` verifies the drafts and is given no hidden states; `sample_tokens`, which calls it, has them where
`execute_model` left them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verl_speculator.serving.lossy_requests import is_lossy, stop_tokens
from verl_speculator.serving.lossy_rows import VerifiedRows


def verified_rows(runner: Any, metadata: Any, hidden_states: Tensor) -> VerifiedRows:
    """The rows of a step; `hidden_states` [R, H] are those sampled from, `metadata` is its `SpecDecodeMetadata`."""
    device, batch = hidden_states.device, runner.input_batch
    params = [runner.requests[name].sampling_params for name in batch.req_ids]
    stops = [stop_tokens(one) for one in params]
    width = max(map(len, stops))
    padded = [[*tokens, *[-1] * (width - len(tokens))] for tokens in stops]
    num_drafts = torch.tensor(metadata.num_draft_tokens, device=device)
    return VerifiedRows(
        tokens=runner.input_ids.gpu[metadata.logits_indices],
        positions=runner.positions[metadata.logits_indices],
        hidden_states=hidden_states,
        starts=metadata.cu_num_sampled_tokens.long() - num_drafts - 1,
        num_drafts=num_drafts,
        prompt_lengths=torch.tensor(batch.num_prompt_tokens[: len(params)], device=device),
        stop_tokens=torch.tensor(padded, dtype=torch.long, device=device).view(len(params), width),
        is_lossy=torch.tensor([is_lossy(one) for one in params], device=device),
    )
