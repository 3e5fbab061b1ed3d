"""Configuration that follows from the device: what is left open is filled in, what cannot work is refused."""

from __future__ import annotations

import importlib.util

from omegaconf import DictConfig, OmegaConf, open_dict
from verl.utils.device import get_device_name

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.config.compose import engine_name
from verl_speculator.trainer.config.megatron import has_megatron_bridge
from verl_speculator.trainer.config.rules import refuse_on_cpu


def apply_device(config: DictConfig) -> None:
    """Fill in device, number types and attention for the device that verl has detected.

    Raises:
        ConfigError: a setting that this device cannot run.
    """
    device = get_device_name()
    if config.trainer.device not in (None, device):
        raise ConfigError(f"trainer.device={config.trainer.device}, but verl finds {device} here: leave it null")
    on_cpu = device == "cpu"
    if on_cpu:
        refuse_on_cpu(config)
    attention = OmegaConf.select(config, "model.override_config.attn_implementation")
    if attention is None and (on_cpu or importlib.util.find_spec("flash_attn") is None):
        attention = "sdpa"
    engine = config.engine
    with open_dict(config):
        config.trainer.device = device
        if attention is not None:
            config.model.override_config.attn_implementation = attention
        if config.data.val_files is None:
            # Nothing to measure on: the device's memory is for something else.
            config.model.measure_sampled_acceptance = False
        if engine_name(config) == "megatron":
            if engine.model_dtype is None:
                # In joint training too: Megatron's optimizer has float32 weights of its own.
                engine.model_dtype = "fp32" if on_cpu else "bf16"
            if engine.vanilla_mbridge is None:
                engine.vanilla_mbridge = on_cpu or not has_megatron_bridge()
            return
        if on_cpu and engine.get("mixed_precision") is None:
            engine.mixed_precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        if engine.model_dtype is None:
            # What trains keeps float32 weights, or small updates would be rounded away.
            engine.model_dtype = "bf16" if config.model.freeze_base_model and not on_cpu else "fp32"
    if engine.ulysses_sequence_parallel_size > 1 and attention not in (None, "flash_attention_2"):
        raise ConfigError(
            "engine.ulysses_sequence_parallel_size above 1 needs flash attention: "
            f"verl's sequence parallelism does not reach into {attention}"
        )
