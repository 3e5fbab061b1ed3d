r"""A speculator type of one's own in one file: its configuration, its model and its adapter.

A gated recurrent unit drafts the tokens. `gate_bias` is a setting that only this type has. Train it with

    verl-speculator train \
        'model.speculator_adapter={path: examples/custom_adapter/gated_adapter.py, name: GatedSpeculatorAdapter}' \
        +model.speculator.gate_bias=2.0 \
        model.speculator.inner_dim=512 \
        model.partial_pretrain=BASE data.train_files=train.parquet

Nothing of the package changes. Whoever loads the trained speculator imports this file first, and then
`Speculator.from_pretrained` knows the type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from verl_speculator.adapters import ChainSpeculatorAdapter
from verl_speculator.errors import ConfigError
from verl_speculator.models import ChainSpeculator, ChainSpeculatorConfig, register_speculator


@dataclass(kw_only=True)
class GatedSpeculatorConfig(ChainSpeculatorConfig):
    """`model.speculator` may set every field; `gate_bias` above 0 lets the state change slowly at first."""

    architectures = ("GatedSpeculator",)

    inner_dim: int = 1024
    gate_bias: float = 0.0

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.inner_dim, int) or self.inner_dim < 1:
            raise ConfigError(f"inner_dim must be a positive integer, not {self.inner_dim!r}.")
        if not isinstance(self.gate_bias, int | float):
            raise ConfigError(f"gate_bias must be a number, not {self.gate_bias!r}.")
        if not self.tie_weights:
            raise ConfigError("tie_weights must be true: this speculator has one set of weights for all heads.")


@register_speculator(GatedSpeculatorConfig)
class GatedSpeculator(ChainSpeculator):
    """`z = σ(U [s; x] + gate_bias)`, `s = z·s + (1 - z)·tanh(W [s; x])`, `logits = head(s)`; `s₀ = P h`."""

    config: GatedSpeculatorConfig

    def __init__(self, config: GatedSpeculatorConfig) -> None:
        super().__init__(config)
        width = config.inner_dim
        self.proj = nn.Linear(config.input_hidden_dim, width, bias=False)
        self.emb = nn.Embedding(config.vocab_size, width)
        self.gate = nn.Linear(2 * width, width, bias=False)
        self.candidate = nn.Linear(2 * width, width, bias=False)
        self.head = nn.ModuleList([nn.Linear(width, config.head_rows, bias=False)])
        self.reset_parameters()

    def begin(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (scaled,) = super().begin(hidden_states)
        return (self.proj(scaled),)

    @property
    def embeddings_are_tied(self) -> bool:
        return True  # one table for all heads, which training then reads once for all of them

    def embed(self, tokens: torch.Tensor, head_index: int) -> torch.Tensor:
        return self.emb(tokens)

    def step(
        self, state: tuple[torch.Tensor, ...], embedded: torch.Tensor, head_index: int
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        (before,) = state
        mixed = torch.cat([before, embedded], dim=-1)
        keep = torch.sigmoid(self.gate(mixed) + self.config.gate_bias)
        after = keep * before + (1 - keep) * torch.tanh(self.candidate(mixed))
        return (after,), after

    def init_std(self, weight: torch.Tensor) -> float:
        return 1 / math.sqrt(min(weight.shape))


class GatedSpeculatorAdapter(ChainSpeculatorAdapter):
    config_class = GatedSpeculatorConfig
