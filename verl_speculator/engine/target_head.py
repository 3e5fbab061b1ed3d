"""The base model's vocabulary matrix: for soft targets, and for measuring what its own sampling would accept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# What some models do to their logits after the matrix. It keeps the largest one the largest, but not the distribution.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class FrozenHead(nn.Module):
    """A copy of the matrix [V, H] for a frozen base, whose own head does not run: sharded, and gathered while used."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)

    @contextmanager
    def gathered(self) -> Iterator[Tensor]:
        unit = cast(FSDPModule, self)
        unit.unshard()
        try:
            yield self.weight
        finally:
            unit.reshard()


def why_not_plain(hf_config: Any, head: nn.Module | None = None) -> str | None:
    """Why the model's logits are not `hidden_states @ weight.T`; None if they are.

    Args:
        hf_config: The model's configuration.
        head: Its output embeddings, where there is a Hugging Face model to look at.
    """
    config = hf_config.get_text_config()
    for name in _LOGIT_SETTINGS:
        value = getattr(config, name, None)
        if value not in (None, 1.0):
            return f"it has {name}={value}"
    if head is not None and not isinstance(head, nn.Linear):
        return f"its output embeddings are a {type(head).__name__}"
    return "its output embeddings have a bias" if head is not None and head.bias is not None else None


@torch.no_grad()
def full_head_weight(model: Any) -> Tensor:
    """The matrix [V, H] of a base that trains under FSDP2, as it is now; every rank must call this."""
    weight = model.get_output_embeddings().weight
    # After a validation step the root unit stays gathered, in storage that the next step frees.
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach().clone()
