"""A base model that Megatron trains together with a speculator: its optimizer step and its checkpoint.

Checked on verl 0.9.1 with megatron-core 0.16.1 and mbridge 0.15.1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from verl_speculator.checkpoint.layout import BASE_FOLDER, RESUME_FOLDER
from verl_speculator.engine.base_export import cast_weights, save_surroundings
from verl_speculator.errors import CheckpointError


class BaseStep:
    """Megatron's `optimizer.step()` in two halves, so that clipping can count parameters which it does not hold."""

    def __init__(self, optimizer: ChainedOptimizer) -> None:
        self._optimizer = optimizer
        overflow = optimizer.prepare_grads()
        self.norm = math.inf if overflow else float(optimizer.get_grad_norm())

    def finish(self, max_norm: float, total_norm: float) -> None:
        """Clip as if all gradients had `total_norm`, and update the parameters."""
        for optimizer in self._optimizer.chained_optimizers:
            parameters = [] if optimizer.is_stub_optimizer else optimizer.get_parameters()
            if parameters:
                decoupled = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, max_norm, total_norm, use_decoupled_grad=decoupled)
        self._optimizer.step_with_ready_grads()


def save_base(folder: Path, engine: Any, dtype: torch.dtype | None) -> None:
    """Write `huggingface/` and what training on needs beside it; every rank must call this.

    The optimizer's state is Megatron's own, for each rank of a model-parallel group: it is of no use to another tensor
    or pipeline parallelism.

    Args:
        folder: Of the checkpoint.
        engine: With the base and its optimizer.
        dtype: Of the weights in `huggingface/`; None for the type in which they train.
    """
    is_cast = dtype not in (None, engine.param_dtype)
    save_weights = engine.bridge.save_weights if engine.vanilla_bridge else engine.bridge.save_hf_weights
    save_weights(engine.module, str(folder / BASE_FOLDER))
    if torch.distributed.get_rank() == 0:
        if is_cast:
            cast_weights(folder / BASE_FOLDER, dtype)
        save_surroundings(folder / BASE_FOLDER, engine.model_config)
    stem = _own_files(folder)
    stem.parent.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    if engine.engine_config.use_distributed_optimizer:
        engine.optimizer.save_parameter_state(f"{stem}_moments.pt")
    if mpu.get_data_parallel_rank(with_context_parallel=True) == 0:
        state = {
            "optimizer": engine.optimizer.state_dict(),
            "scheduler": engine.lr_scheduler.state_dict(),
            "random": get_cuda_rng_tracker().get_states(),
        }
        if is_cast:
            # In full precision, for going on exactly.
            state["weights"] = [dict(module.named_parameters()) for module in engine.module]
        torch.save(state, f"{stem}.pt")


@torch.no_grad()
def load_base(folder: Path, engine: Any) -> None:
    """Undo `save_base`.

    Raises:
        CheckpointError: the checkpoint has no state of a base for this rank.
    """
    stem = _own_files(folder)
    if not Path(f"{stem}.pt").is_file():
        raise CheckpointError(
            f"{folder} has no base model's training state for this layout: it was written with a frozen base, or with "
            "another tensor or pipeline parallelism"
        )
    state = torch.load(f"{stem}.pt", weights_only=True)
    if "weights" in state:
        for module, weights in zip(engine.module, state["weights"], strict=True):
            for name, parameter in module.named_parameters():
                parameter.copy_(weights[name])
    else:
        load_weights = engine.bridge.load_weights if engine.vanilla_bridge else engine.bridge.load_hf_weights
        load_weights(engine.module, str(folder / BASE_FOLDER))
    engine.optimizer.load_state_dict(state["optimizer"])
    if engine.engine_config.use_distributed_optimizer:
        engine.optimizer.load_parameter_state(f"{stem}_moments.pt")
    engine.lr_scheduler.load_state_dict(state["scheduler"])
    get_cuda_rng_tracker().set_states(state["random"])


def _own_files(folder: Path) -> Path:
    tensor, pipeline = mpu.get_tensor_model_parallel_rank(), mpu.get_pipeline_model_parallel_rank()
    return folder / RESUME_FOLDER / "base" / f"tensor_{tensor}_pipeline_{pipeline}"
