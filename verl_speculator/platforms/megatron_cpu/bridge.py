"""mbridge with Megatron's local layers in place of TransformerEngine's. Checked with mbridge 0.15.1."""

from __future__ import annotations

from typing import Any

from mbridge.core import llm_bridge
from mbridge.core.bridge import Bridge
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from verl_speculator.platforms.megatron_cpu.layers import without_transformer_engine
from verl_speculator.platforms.megatron_cpu.patches import Patch

# TransformerEngine has the norms inside the linear layers that they feed, and mbridge knows them by those names only.
_FUSED_NAMES = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}

_names_in_hugging_face = Bridge._weight_name_mapping_mcore_to_hf


def _local_block_spec(
    config: TransformerConfig,
    use_transformer_engine: bool = True,
    normalization: str | None = None,
    qk_l2_norm: bool = False,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    return without_transformer_engine(
        get_gpt_decoder_block_spec(
            config, False, normalization=normalization, qk_l2_norm=qk_l2_norm, vp_stage=vp_stage, pp_rank=pp_rank
        )
    )


def _names_of_local_layers(self: Any, mcore_weights_name: str) -> list[str]:
    for local, fused in _FUSED_NAMES.items():
        mcore_weights_name = mcore_weights_name.replace(local, fused)
    return _names_in_hugging_face(self, mcore_weights_name)


def bridge_patches() -> list[Patch]:
    return [
        Patch(llm_bridge, "get_gpt_decoder_block_spec", _local_block_spec),
        Patch(Bridge, "_weight_name_mapping_mcore_to_hf", _names_of_local_layers),
    ]
