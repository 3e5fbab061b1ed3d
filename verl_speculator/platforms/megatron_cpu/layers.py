"""The two layers that Megatron has only through TransformerEngine or apex. Checked with megatron-core 0.16.1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from verl_speculator.errors import ConfigError


class RmsNorm(nn.RMSNorm):
    """An RMS norm that says when it sees a part of the sequence: Megatron then sums its gradient over the ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ConfigError("Megatron on the CPU has plain RMS norms only")
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CausalAttention(MegatronModule):
    """Causal attention with grouped queries (n query heads, g groups of size d) on whole sequences.

    Padding is on the right, where a causal mask hides it from everything that counts.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__(config=config)
        unsupported = {
            "context_parallel_size": config.context_parallel_size != 1,
            "attention_dropout": config.attention_dropout != 0,
            "window_size": config.window_size is not None,
            "softmax_type": config.softmax_type != "vanilla",
        }
        for name, is_set in unsupported.items():
            if is_set:
                raise ConfigError(f"{name}={getattr(config, name)} is not supported by Megatron on the CPU")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """[S, B, n, d] and keys and values [S, B, g, d] to [S, B, n * d]; packed input [T, n, d] to [T, n * d]."""
        if packed_seq_params is None:
            attended = self._attend(*(states.transpose(0, 1) for states in (query, key, value)))
            return attended.transpose(0, 1).flatten(2)
        starts = packed_seq_params.cu_seqlens_q_padded
        if starts is None:
            starts = packed_seq_params.cu_seqlens_q
        lengths = starts.diff().tolist()
        sequences = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return torch.cat([self._attend(*(states[None] for states in sequence))[0] for sequence in sequences]).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, S, n, d] to the same."""
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return attended.transpose(1, 2)


def without_transformer_engine(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Put the layers of this module into Megatron's local specification of a dense decoder, in place."""
    block.layer_norm = RmsNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RmsNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = CausalAttention
        for name in ("q_layernorm", "k_layernorm"):
            # An identity where the model has no such norm.
            if getattr(attention, name) is not IdentityOp:
                setattr(attention, name, RmsNorm)
    return block
