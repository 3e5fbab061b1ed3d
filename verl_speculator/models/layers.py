"""The layers that speculators are built from, in the reference implementations' numerics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

ModuleT = TypeVar("ModuleT", bound=nn.Module)

EPS = 1e-6


def scale_hidden_states(hidden_states: torch.Tensor) -> torch.Tensor:
    """`RMS(h)/√2`, the first state under `scale_input`; the shape stays [..., H]."""
    return F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=EPS) / math.sqrt(2)


class RMSNorm(nn.Module):
    """RMS norm, `x / sqrt(mean(x²) + eps)`, with weight and bias, both [width].

    The mean is taken in float32 whatever the type of `x`: squares of float16 states pass its largest number.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, EPS) + self.bias


def state_weight(n_predict: int) -> float:
    return 0.5 ** (0.5 / n_predict)


def embedding_scale(n_predict: int, width: int) -> float:
    """`a = ew/sw`, the factor of token embeddings: half of the last head's state then still comes from h."""
    weight = state_weight(n_predict)
    return math.sqrt((1 - weight**2) * width / 2) / weight


def linear(in_width: int, out_width: int) -> nn.Linear:
    return _without_default_init(nn.Linear, in_width, out_width, bias=False)


def embedding(vocab_size: int, width: int) -> nn.Embedding:
    return _without_default_init(nn.Embedding, vocab_size, width)


def bridge(widths: Iterable[int]) -> nn.Sequential:
    """One linear layer wherever two neighbouring widths differ; the identity when they are all equal."""
    return nn.Sequential(*(linear(before, after) for before, after in pairwise(widths) if before != after))


def for_head(modules: nn.ModuleList, head_index: int) -> nn.Module:
    """What head `head_index` uses: its own module, or the last one there is when the rest share it."""
    return modules[min(head_index, len(modules) - 1)]


def _without_default_init(module_class: type[ModuleT], *args: Any, **kwargs: Any) -> ModuleT:
    # Every speculator initialises itself; torch's own initialisation of a vocabulary matrix would double the time.
    return skip_init(module_class, *args, device=torch.get_default_device(), **kwargs)
