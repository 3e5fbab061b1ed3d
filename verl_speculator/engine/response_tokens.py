"""Which tokens of a batch of rollouts a speculator learns from."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

# Beside verl's `loss_mask`, which is as long as a response and which verl counts.
MASK_KEY = "speculator_loss_mask"


def response_mask(data: TensorDict) -> Any:
    """1 where a token is the policy's own, as long as the sequences: nested, [B, lengths].

    verl's mask covers the response only. In rollouts of several turns it is 0 on what tools and users said.

    Args:
        data: Rows as verl's actor gets them, with `input_ids`, `prompts` and `loss_mask`, nested or padded.
    """
    input_ids = data["input_ids"]
    prompts = data["prompts"]
    if prompts.is_nested:
        prompt_lengths = prompts.offsets().diff().tolist()
    else:
        prompt_lengths = data["attention_mask"][:, : prompts.shape[1]].sum(dim=1).tolist()
    values = torch.zeros_like(input_ids.values())
    offsets = input_ids.offsets().tolist()
    for row, mask in enumerate(data["loss_mask"].unbind()):
        start, end = offsets[row] + int(prompt_lengths[row]), offsets[row + 1]
        values[start:end] = mask[: end - start].to(values.dtype)
    return torch.nested.nested_tensor_from_jagged(values, input_ids.offsets())


def at_most(mask: Any, limit: int, generator: torch.Generator) -> Any:
    """A mask with `limit` of its ones at most: those of whole rows drawn at random, the last of which is cut.

    The rows are drawn before a batch is cut into micro-batches, so the choice does not depend on these.
    """
    rows = list(mask.unbind())
    left = limit
    for row in torch.randperm(len(rows), generator=generator).tolist():
        rows[row] = rows[row] * (rows[row].cumsum(0) <= left)
        left -= int(rows[row].sum())
    return torch.nested.nested_tensor_from_jagged(torch.cat(rows), mask.offsets())
