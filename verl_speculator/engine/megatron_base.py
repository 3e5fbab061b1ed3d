"""A base model that Megatron trains together with a speculator: its optimizer step and its checkpoint.

Checked on verl 0.9.1 with megatron-core 0.16.1 and mbridge 0.15.1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from verl.trainer.config import CheckpointConfig
from verl.utils.checkpoint.megatron_checkpoint_manager import MegatronCheckpointManager

from verl_speculator.checkpoint.layout import BASE_FOLDER, RESUME_FOLDER

_STATE_FOLDER = f"{RESUME_FOLDER}/base"


class BaseStep:
    """Megatron's ``optimizer.step()`` in two halves, so that clipping can count parameters which it does not hold."""

    def __init__(self, optimizer: ChainedOptimizer) -> None:
        self._optimizer = optimizer
        overflow = optimizer.prepare_grads()
        self.norm = math.inf if overflow else float(optimizer.get_grad_norm())

    def finish(self, max_norm: float, total_norm: float) -> None:
        """Clip as if all gradients had ``total_norm``, and update the parameters."""
        for optimizer in self._optimizer.chained_optimizers:
            parameters = [] if optimizer.is_stub_optimizer else optimizer.get_parameters()
            if parameters:
                decoupled = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, max_norm, total_norm, use_decoupled_grad=decoupled)
        self._optimizer.step_with_ready_grads()


def checkpoint_manager(engine: Any) -> MegatronCheckpointManager:
    """verl's manager, for the optimizer's state only: the weights are written as a Hugging Face folder instead."""
    manager = engine.checkpoint_mananager
    contents = CheckpointConfig(save_contents=["optimizer", "extra"], load_contents=["optimizer", "extra"])
    manager.checkpoint_config = contents
    manager.checkpoint_save_contents = contents.save_contents
    manager.checkpoint_load_contents = contents.load_contents
    return manager


def save_base(folder: Path, engine: Any) -> None:
    """Write ``huggingface/`` and the optimizer's state; every rank must call this."""
    _save_weights(folder / BASE_FOLDER, engine)
    checkpoint_manager(engine).save_checkpoint(local_path=str(folder / _STATE_FOLDER))


def load_base(folder: Path, engine: Any) -> None:
    weights = str(folder / BASE_FOLDER)
    if engine.vanilla_bridge:
        engine.bridge.load_weights(engine.module, weights)
    else:
        engine.bridge.load_hf_weights(engine.module, weights)
    checkpoint_manager(engine).load_checkpoint(local_path=str(folder / _STATE_FOLDER))


def _save_weights(folder: Path, engine: Any) -> None:
    if engine.vanilla_bridge:
        engine.bridge.save_weights(engine.module, str(folder))
    else:
        engine.bridge.save_hf_weights(engine.module, str(folder))
    processor = engine.model_config.get_processor()
    if torch.distributed.get_rank() == 0 and processor is not None:
        processor.save_pretrained(folder)
