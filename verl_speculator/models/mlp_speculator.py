"""The MLP speculator of Wertheimer et al. 2024, arXiv:2404.19124."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from verl_speculator.errors import ConfigError
from verl_speculator.models.chain import ChainSpeculator, ChainSpeculatorConfig, State
from verl_speculator.models.config import SpeculatorConfig, parse_width
from verl_speculator.models.layers import RMSNorm, embedding, embedding_scale, for_head, linear
from verl_speculator.models.speculator import Speculator


@SpeculatorConfig.register("mlp")
@dataclass(kw_only=True)
class MLPSpeculatorConfig(ChainSpeculatorConfig):
    """Adds `inner_dim`, the width of state and token embeddings; 0 is the base model's hidden size.

    In `config.json` the key `emb_dim` is the base model's hidden size, here `input_hidden_dim`.
    """

    speculators_model_type: ClassVar[str] = "mlp"
    architectures: ClassVar[tuple[str, ...]] = ("MLPSpeculatorPreTrainedModel", "ArcticMLPSpeculatorPreTrainedModel")

    inner_dim: int = field(default=0, metadata={"help": "width of state and token embeddings; 0: the base's own"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner_dim = int(self.inner_dim) or self.input_hidden_dim

    def validate(self) -> None:
        super().validate()
        stands_for_hidden_size = self.inner_dim == 0 and not isinstance(self.inner_dim, bool)
        if not stands_for_hidden_size and len(parse_width(self.inner_dim, "inner_dim")) > 1:
            raise ConfigError(f"inner_dim must be a single integer for an MLP speculator, not {self.inner_dim!r}.")

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return values | {"emb_dim": values.pop("input_hidden_dim")}

    @classmethod
    def _fields_from_file(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._fields_from_file(values)
        if "input_hidden_dim" not in fields and "emb_dim" in fields:
            fields["input_hidden_dim"] = fields["emb_dim"]
        return fields


@Speculator.register("mlp")
class MLPSpeculator(ChainSpeculator):
    """`s = GELU(LN_i(P_i s + a·E_i x))`, `logits_i = head_i(s)` (Wertheimer et al. 2024, arXiv:2404.19124).

    Tied, all heads share one embedding, norm and vocabulary matrix, and all but the first one projection.
    """

    config: MLPSpeculatorConfig

    def __init__(self, config: MLPSpeculatorConfig) -> None:
        super().__init__(config)
        width, n_predict = config.inner_dim, config.n_predict
        own = 1 if config.tie_weights else n_predict
        own_proj = min(2, n_predict) if config.tie_weights else n_predict
        self.emb = nn.ModuleList(embedding(config.vocab_size, width) for _ in range(own))
        self.proj = nn.ModuleList(linear(width if i else config.input_hidden_dim, width) for i in range(own_proj))
        self.ln = nn.ModuleList(RMSNorm(width) for _ in range(own))
        self.head = nn.ModuleList(linear(width, config.head_rows) for _ in range(own))
        self.embedding_scale = embedding_scale(n_predict, width)
        self.reset_parameters()

    @property
    def embeddings_are_tied(self) -> bool:
        return len(self.emb) == 1

    def embed(self, tokens: torch.Tensor, head_index: int) -> torch.Tensor:
        return for_head(self.emb, head_index)(tokens)

    def step(self, state: State, embedded: torch.Tensor, head_index: int) -> tuple[State, torch.Tensor]:
        (hidden,) = state
        mixed = torch.add(for_head(self.proj, head_index)(hidden), embedded, alpha=self.embedding_scale)
        output = F.gelu(for_head(self.ln, head_index)(mixed))
        return (output,), output

    def first_projection(self) -> torch.Tensor:
        return self.get_parameter("proj.0.weight")

    def init_std(self, weight: torch.Tensor) -> float:
        return 1 / math.sqrt(self.config.inner_dim)

    def tied_copies(self) -> dict[str, str]:
        if not self.config.tie_weights:
            return {}
        shared = {f"{name}.{i}": f"{name}.0" for name in ("emb", "ln", "head") for i in range(1, self.n_predict)}
        return shared | {f"proj.{i}": "proj.1" for i in range(2, self.n_predict)}
