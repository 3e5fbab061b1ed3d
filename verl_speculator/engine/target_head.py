"""How the base's logits follow from its last states: for soft targets, and for what its own sampling would accept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from verl_speculator.losses import TargetHead

# What some models do to their logits after the matrix: Cohere and Falcon-H1 multiply, Granite divides, Gemma caps.
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAP = "final_logit_softcapping"


class FrozenHead(nn.Module):
    """A copy of the head of a frozen base, whose own does not run: sharded, and gathered while used."""

    def __init__(self, head: TargetHead) -> None:
        super().__init__()
        self.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        self.bias = None if head.bias is None else nn.Parameter(head.bias.detach().clone(), requires_grad=False)
        self._scale, self._softcap = head.scale, head.softcap

    @contextmanager
    def gathered(self) -> Iterator[TargetHead]:
        unit = cast(FSDPModule, self)
        unit.unshard()
        try:
            yield TargetHead(self.weight, self.bias, self._scale, self._softcap)
        finally:
            unit.reshard()


def target_head(hf_config: Any, weight: Tensor, bias: Tensor | None = None) -> TargetHead:
    """A base's head, with what its configuration says that becomes of the logits."""
    config, scale = hf_config.get_text_config(), 1.0
    for name in _FACTORS:
        scale *= _setting(config, name) or 1.0
    for name in _DIVISORS:
        scale /= _setting(config, name) or 1.0
    return TargetHead(weight, bias, scale, _setting(config, _SOFTCAP))


def why_unknown(hf_config: Any, head: nn.Module) -> str | None:
    """Why `target_head` cannot tell a model's logits; None if it can.

    Args:
        hf_config: The model's configuration.
        head: Its output embeddings, with or without storage.
    """
    config = hf_config.get_text_config()
    for name in (*_FACTORS, *_DIVISORS, _SOFTCAP):
        value = getattr(config, name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            return f"it has {name}={value}"
    return None if isinstance(head, nn.Linear) else f"its output embeddings are a {type(head).__name__}"


def why_not_plain(hf_config: Any, head: nn.Module) -> str | None:
    """Why a model's logits are not `hidden_states @ weight.T`; None if they are."""
    config = hf_config.get_text_config()
    for name in (*_FACTORS, *_DIVISORS, _SOFTCAP):
        value = getattr(config, name, None)
        if value not in (None, 1.0):
            return f"it has {name}={value}"
    if isinstance(head, nn.Linear) and head.bias is not None:
        return "its output embeddings have a bias"
    return why_unknown(hf_config, head)


def _setting(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return None if value is None else float(value)


@torch.no_grad()
def full_head(model: Any) -> TargetHead:
    """The head of a base that trains under FSDP2, as it is now; every rank must call this."""
    head = model.get_output_embeddings()
    return target_head(model.config, _full(head.weight), None if head.bias is None else _full(head.bias))


def _full(parameter: Tensor) -> Tensor:
    # After a validation step the root unit stays gathered, in storage that the next step frees.
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()
