"""verl's Megatron engine with a speculator beside its language model. Checked on verl 0.9.1, megatron-core 0.16.1.

The speculator is no part of Megatron's model: its unit is sharded over all ranks, whatever the parallel sizes. Megatron
runs the base and yields its hidden states.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from verl.utils.device import get_device_name
from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_
from verl.utils.megatron.optimizer import get_megatron_optimizer_param_scheduler
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.base import EngineRegistry

from verl_speculator.engine.hidden_states import output_embeddings
from verl_speculator.engine.megatron.base import BaseStep, load_base, save_base
from verl_speculator.engine.megatron.step import MegatronSpeculatorStep
from verl_speculator.engine.model_config import MODEL_TYPE
from verl_speculator.engine.optimizer_config import adam_arguments, base_lr
from verl_speculator.engine.speculator_engine import full_norm
from verl_speculator.engine.target_head import FrozenHead
from verl_speculator.errors import ConfigError


@EngineRegistry.register(model_type=MODEL_TYPE, backend="megatron", device=["cuda", "npu"])
class MegatronEngineWithLMHeadAndSpeculator(MegatronSpeculatorStep):
    """Trains a speculator on a frozen base model, or both together (`model.freeze_base_model=false`)."""

    optimizer_config: Any
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
        self._compute_dtype = self.param_dtype
        if self.model_config.speculator_dtype:
            self._compute_dtype = PrecisionType.to_dtype(self.model_config.speculator_dtype)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                self.model_config.hf_config, trust_remote_code=self.model_config.trust_remote_code
            )
        has_bias = getattr(output_embeddings(base), "bias", None) is not None
        self._build_speculator(
            base, "its output embeddings have a bias, and Megatron's have none" if has_bias else None
        )
        if self._needs_frozen_head:
            self._frozen_head = FrozenHead(self._trained_head())
        self._watch_base()
        mesh = init_device_mesh(get_device_name(), (torch.distributed.get_world_size(),))
        self._shard_speculator(mesh, torch.float32)
        self.speculator_optimizer = torch.optim.AdamW(
            cast(Any, self.adapter.get_optimizer_params()),
            lr=self.optimizer_config.lr,
            betas=tuple(self.optimizer_config.betas),
            weight_decay=self.optimizer_config.weight_decay,
            **adam_arguments(),
        )
        self.speculator_scheduler = get_megatron_optimizer_param_scheduler(
            self.speculator_optimizer, self.optimizer_config
        )

    def _build_tf_config(self) -> None:
        hf_config = self.model_config.hf_config
        if hf_config.get_text_config() is not hf_config:
            raise ConfigError(
                f"model.path: a {hf_config.model_type} model has several modalities, and with engine=megatron a "
                "speculator trains on text models: use engine=fsdp optim=fsdp"
            )
        try:
            super()._build_tf_config()
        except ValueError as error:
            if "Unregistered model type" not in str(error):
                raise
            raise ConfigError(
                f"model.path: mbridge cannot bring a {hf_config.model_type} model to Megatron: "
                "use engine=fsdp optim=fsdp"
            ) from error
        pipeline_size = self.engine_config.pipeline_model_parallel_size
        # Only some of mbridge's classes know where to find an output layer that has no weights of its own in the file.
        if pipeline_size > 1 and hf_config.tie_word_embeddings and self.vanilla_bridge and not _maps_tied(self.bridge):
            raise ConfigError(
                f"engine.pipeline_model_parallel_size={pipeline_size}: mbridge cannot bring the tied embeddings of a "
                f"{hf_config.model_type} model to two pipeline stages: set it to 1 and raise "
                "engine.tensor_model_parallel_size, or give engine.vanilla_mbridge=false where Megatron-Bridge is there"
            )

    def _build_optimizer(self) -> Any:
        with self._optimizer_config_of_base():
            return super()._build_optimizer()

    def _build_lr_scheduler(self) -> Any:
        with self._optimizer_config_of_base():
            return super()._build_lr_scheduler()

    @contextmanager
    def _optimizer_config_of_base(self) -> Iterator[None]:
        """verl builds the base's optimizer and schedule from the section that is the speculator's, too."""
        own = self.optimizer_config
        share = base_lr(own) / own.lr
        scaled = {name: share * getattr(own, name) for name in ("lr", "min_lr", "lr_warmup_init")}
        self.optimizer_config = dataclasses.replace(own, **scaled)
        try:
            yield
        finally:
            self.optimizer_config = own

    def _base_modules(self) -> list[nn.Module]:
        return self.module

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
        norm = float(full_norm(fsdp2_clip_grad_norm_(parameters, max_norm if base_step is None else math.inf)))
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

    # Checkpoints

    def _training_state(self) -> tuple[nn.Module, torch.optim.Optimizer, Any, nn.Module | None]:
        return self.speculator_unit, self.speculator_optimizer, self.speculator_scheduler, None

    def _save_base(self, folder: Path) -> None:
        save_base(folder, self, self._base_dtype)

    def _load_base(self, folder: Path) -> None:
        load_base(folder, self)


def _maps_tied(bridge: Any) -> bool:
    # Not installed where Megatron-Bridge reads the models.
    from mbridge.core.bridge import Bridge

    return type(bridge)._adjust_mapping_for_shared_weights is not Bridge._adjust_mapping_for_shared_weights
