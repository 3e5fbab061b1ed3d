"""The base model's vocabulary matrix, for measuring in validation what its own sampling would accept."""

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


def plain_head(model: Any) -> nn.Linear | None:
    """The output embeddings if `hidden_states @ weight.T` are the model's logits; None if it does more to them."""
    head = model.get_output_embeddings()
    is_matrix = isinstance(head, nn.Linear) and head.bias is None
    return head if is_matrix and has_plain_logits(model.config) else None


def has_plain_logits(hf_config: Any) -> bool:
    """Whether the model's configuration asks for nothing between the vocabulary matrix and the distribution."""
    config = hf_config.get_text_config()
    return all(getattr(config, name, None) in (None, 1.0) for name in _LOGIT_SETTINGS)


@contextmanager
def gathered_head(model: Any) -> Iterator[Tensor]:
    """The matrix of a base that is being trained, under FSDP2."""
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        yield weight.full_tensor() if isinstance(weight, DTensor) else weight
