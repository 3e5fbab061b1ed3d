"""verl's Megatron engine with a speculator beside its language model. Checked on verl 0.9.1, megatron-core 0.16.1.

The speculator is no part of Megatron's model. It is the FSDP2 unit of the FSDP engine, sharded over all ranks, so its
optimizer and its checkpoints do not depend on how the base is laid out. Megatron runs the base and yields the hidden
states of its last stage.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_
from verl.utils.megatron.optimizer import get_megatron_optimizer_param_scheduler
from verl.utils.megatron_utils import unwrap_model
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import (
    EngineEvalModeCtx,
    EngineTrainModeCtx,
)

from verl_speculator.adapters import build_speculator_adapter
from verl_speculator.checkpoint.training_state import (
    load_speculator,
    load_training_state,
    save_speculator,
    save_training_state,
)
from verl_speculator.engine.megatron_base import BaseStep, load_base, save_base
from verl_speculator.engine.megatron_hidden_states import (
    record_output_layer_input,
    replace_output_layer,
)
from verl_speculator.engine.megatron_step import MegatronSpeculatorStep
from verl_speculator.engine.model_config import MODEL_TYPE
from verl_speculator.engine.speculator_unit import PREFIX, SpeculatorUnit, build_speculator, shard
from verl_speculator.engine.target_head import FrozenHead, has_plain_logits
from verl_speculator.errors import ConfigError


class _TrainMode(EngineTrainModeCtx):
    def __enter__(self) -> None:
        super().__enter__()
        self.engine.set_train_mode(True)


class _EvalMode(EngineEvalModeCtx):
    def __enter__(self) -> None:
        super().__enter__()
        self.engine.set_train_mode(False)


@EngineRegistry.register(model_type=MODEL_TYPE, backend="megatron", device=["cuda", "npu"])
class MegatronEngineWithLMHeadAndSpeculator(MegatronSpeculatorStep):
    """Trains a speculator on a frozen base model, or both together (``model.freeze_base_model=false``).

    ``infer_batch`` computes the same losses and metrics without training. A step's metrics are sums and counts over
    the whole global batch, the same on every rank.
    """

    speculator_optimizer: torch.optim.Optimizer
    speculator_scheduler: Any

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        if model_config.freeze_base_model:
            # verl then builds a model without gradient buffers and optimizer.
            engine_config = dataclasses.replace(engine_config, forward_only=True)
        # Only Megatron-Bridge's models take this key from the engine's own section; mbridge's would ignore it.
        transformer = {
            **engine_config.override_transformer_config,
            "sequence_parallel": engine_config.sequence_parallel,
        }
        engine_config = dataclasses.replace(engine_config, override_transformer_config=transformer)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    # Building

    def initialize(self) -> None:
        super().initialize()
        self.adapter = build_speculator_adapter(self.model_config.speculator_adapter, self.model_config.speculator)
        self._compute_dtype = self.param_dtype
        if self.model_config.speculator_dtype:
            self._compute_dtype = PrecisionType.to_dtype(self.model_config.speculator_dtype)
        self._mesh = init_device_mesh(get_device_name(), (torch.distributed.get_world_size(),))
        self._watch_hidden_states()
        self._build_speculator_unit()
        self.speculator_optimizer = torch.optim.AdamW(
            cast(Any, self.adapter.get_optimizer_params()),
            lr=self.optimizer_config.lr,
            betas=tuple(self.optimizer_config.betas),
            weight_decay=self.optimizer_config.weight_decay,
        )
        self.speculator_scheduler = get_megatron_optimizer_param_scheduler(
            self.speculator_optimizer, self.optimizer_config
        )

    def _build_tf_config(self) -> None:
        try:
            super()._build_tf_config()
        except ValueError as error:
            if "Unregistered model type" not in str(error):
                raise
            model_type = self.model_config.hf_config.model_type
            raise ConfigError(
                f"model.path: mbridge cannot bring a {model_type} model to Megatron: use engine=fsdp optim=fsdp"
            ) from error

    def _watch_hidden_states(self) -> None:
        self._measures_sampling = self.model_config.measure_sampled_acceptance and has_plain_logits(
            self.model_config.hf_config
        )
        if self.is_base_frozen and self._measures_sampling:
            self._frozen_head = FrozenHead(self._output_weight())
            shard(self._frozen_head, self._mesh, MixedPrecisionPolicy())
        if not mpu.is_pipeline_last_stage():
            return
        model = unwrap_model(self.module[-1])
        if self.is_base_frozen:
            replace_output_layer(model)
        else:
            self._hidden_states = record_output_layer_input(model)

    def _build_speculator_unit(self) -> None:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                self.model_config.hf_config, trust_remote_code=self.model_config.trust_remote_code
            )
        self.adapter.speculator = build_speculator(
            self.adapter, base, self.model_config.speculator_path, self.engine_config.seed
        )
        self.speculator_unit = SpeculatorUnit(self.adapter)
        shard(self.speculator_unit, self._mesh, MixedPrecisionPolicy(self._compute_dtype, torch.float32))

    # Modes and placement

    def train_mode(self, **kwargs: Any) -> _TrainMode:
        return _TrainMode(self, **kwargs)

    def eval_mode(self, **kwargs: Any) -> _EvalMode:
        return _EvalMode(self, **kwargs)

    def set_train_mode(self, training: bool) -> None:
        # A frozen base must not drop out: its hidden states are the data that the speculator learns from.
        for module in self.module:
            module.train(training and not self.is_base_frozen)
        self.speculator_unit.train(training)

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if model and hasattr(self, "speculator_unit"):
            target = get_device_id() if device == get_device_name() else device
            self.speculator_unit.to(target)
            if self._frozen_head is not None:
                self._frozen_head.to(target)

    # The optimizer

    def optimizer_zero_grad(self) -> None:
        self.speculator_optimizer.zero_grad()
        if not self.is_base_frozen:
            super().optimizer_zero_grad()

    def optimizer_step(self) -> float:
        """Clip by the norm over everything that trains, and return that norm."""
        max_norm = self.optimizer_config.clip_grad
        parameters = list(self.speculator_unit.parameters())
        base_step = None if self.is_base_frozen else BaseStep(self.optimizer)
        norm = _whole(fsdp2_clip_grad_norm_(parameters, max_norm if base_step is None else math.inf))
        if base_step is not None:
            norm = math.hypot(norm, base_step.norm)
            scale = min(max_norm / (norm + 1e-6), 1.0)
            torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], scale)
        if not math.isfinite(norm):
            print(f"WARN: grad_norm is not finite: {norm}; the step is skipped")
            self.optimizer_zero_grad()
            return norm
        self.speculator_optimizer.step()
        if base_step is not None:
            base_step.finish(max_norm, norm)
        return norm

    def lr_scheduler_step(self) -> float:
        self.speculator_scheduler.step(1)
        if not self.is_base_frozen:
            super().lr_scheduler_step()
        return self.speculator_optimizer.param_groups[0]["lr"]

    # Checkpoints: only what trains, in the layout of `verl_speculator.checkpoint.layout`

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Write this step's files into ``local_path``; every rank must call it."""
        folder = Path(local_path)
        save_speculator(folder, self.adapter.speculator, self.speculator_unit, PREFIX)
        save_training_state(folder, self.speculator_unit, self.speculator_optimizer, self.speculator_scheduler, None)
        if not self.is_base_frozen:
            save_base(folder, self)
        torch.distributed.barrier()

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False, **kwargs: Any
    ) -> None:
        folder = Path(local_path)
        load_speculator(folder, self.speculator_unit, PREFIX)
        load_training_state(folder, self.speculator_unit, self.speculator_optimizer, self.speculator_scheduler, None)
        if not self.is_base_frozen:
            load_base(folder, self)
        torch.distributed.barrier()


def _whole(norm: Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
