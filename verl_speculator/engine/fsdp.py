"""verl's FSDP engine with a speculator beside its language model. Checked on verl 0.9.1.

verl wraps the base model as ever. The speculator is an FSDP2 unit of its own on the same mesh, whatever wraps the
base, so a frozen base has no part in the backward pass at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import EngineEvalModeCtx, EngineTrainModeCtx, FSDPEngineWithLMHead

from verl_speculator.adapters import SpeculatorAdapter, build_speculator_adapter
from verl_speculator.checkpoint.training_state import (
    load_speculator,
    load_training_state,
    save_speculator,
    save_training_state,
)
from verl_speculator.engine.base_export import save_base_model
from verl_speculator.engine.hidden_states import (
    LastHiddenStates,
    drop_padding,
    gather_sequence,
    record_lm_head_input,
    replace_lm_head,
    share_of_sequences,
    share_of_targets,
)
from verl_speculator.engine.model_config import MODEL_TYPE
from verl_speculator.engine.speculator_unit import PREFIX, SpeculatorUnit, build_speculator, shard
from verl_speculator.engine.step_sums import StepSums
from verl_speculator.engine.target_head import FrozenHead, gathered_head, plain_head
from verl_speculator.losses import PackedHiddenStates


class _TrainMode(EngineTrainModeCtx):
    def __enter__(self) -> None:
        super().__enter__()
        self.engine.set_train_mode(True)


class _EvalMode(EngineEvalModeCtx):
    def __enter__(self) -> None:
        super().__enter__()
        self.engine.set_train_mode(False)


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu"])
@EngineRegistry.register(model_type=MODEL_TYPE, backend="fsdp2", device="cpu")
class FSDPEngineWithLMHeadAndSpeculator(FSDPEngineWithLMHead):
    """Trains a speculator on a frozen base model, or both together (``model.freeze_base_model=false``).

    ``infer_batch`` computes the same losses and metrics without training. A step's metrics are sums and counts over
    the whole global batch, the same on every rank.
    """

    adapter: SpeculatorAdapter
    speculator_unit: SpeculatorUnit
    _hidden_states: LastHiddenStates
    _frozen_head: FrozenHead | None = None
    _sums: StepSums

    @property
    def is_base_frozen(self) -> bool:
        return self.model_config.freeze_base_model

    # Building: verl calls these in this order.

    def _build_module(self) -> nn.Module:
        # verl's loader accepts its own two model types only.
        self.model_config.model_type = "language_model"
        try:
            module = super()._build_module()
        finally:
            self.model_config.model_type = MODEL_TYPE
        self.adapter = build_speculator_adapter(self.model_config.speculator_adapter, self.model_config.speculator)
        head = plain_head(module) if self.model_config.measure_sampled_acceptance else None
        self._has_plain_head = head is not None
        if self.is_base_frozen:
            self._frozen_head = FrozenHead(head.weight) if head is not None else None
            self._hidden_states = replace_lm_head(module)
            module.gradient_checkpointing_disable()
            module.requires_grad_(False)
        else:
            self._hidden_states = record_lm_head_input(module)
        self.adapter.speculator = build_speculator(
            self.adapter, module, self.model_config.speculator_path, self.engine_config.seed
        )
        return module

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        module = super()._build_fsdp_module(module)
        self.speculator_unit = SpeculatorUnit(self.adapter)
        self._compute_dtype, reduce_dtype = self._precision()
        policy = MixedPrecisionPolicy(param_dtype=self._compute_dtype, reduce_dtype=reduce_dtype)
        shard(self.speculator_unit, self.device_mesh, policy)
        if self._frozen_head is not None:
            shard(self._frozen_head, self.device_mesh, MixedPrecisionPolicy())
        return module

    def _precision(self) -> tuple[torch.dtype, torch.dtype]:
        names = self.engine_config.mixed_precision or {}
        return (
            PrecisionType.to_dtype(self.model_config.speculator_dtype or names.get("param_dtype", "bf16")),
            PrecisionType.to_dtype(names.get("reduce_dtype", "fp32")),
        )

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        params = list(self.adapter.get_optimizer_params())
        if not self.is_base_frozen:
            base = [parameter for parameter in module.parameters() if parameter.requires_grad]
            groups = params if params and isinstance(params[0], dict) else [{"params": params}]
            params = [{"params": base}, *groups]
        return build_optimizer(params, self.optimizer_config)

    # Modes and placement

    def train_mode(self, **kwargs: Any) -> _TrainMode:
        return _TrainMode(self, **kwargs)

    def eval_mode(self, **kwargs: Any) -> _EvalMode:
        return _EvalMode(self, **kwargs)

    def set_train_mode(self, training: bool) -> None:
        # A frozen base must not drop out: its hidden states are the data that the speculator learns from.
        self.module.train(training and not self.is_base_frozen)
        self.speculator_unit.train(training)

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if model and not self.engine_config.forward_only:
            target = get_device_id() if device == get_device_name() else device
            self.speculator_unit.to(target)
            if self._frozen_head is not None:
                self._frozen_head.to(target)

    # A step

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable, forward_only: bool = False
    ) -> dict[str, Any]:
        self._sums = StepSums(self.adapter, data, self.get_data_parallel_group())
        super().forward_backward_batch(data, loss_function, forward_only)
        return self._sums.output(data, self.model_config.speculator_loss_coeff)

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        micro_batch = micro_batch.to(get_device_id())
        model_inputs, output_args = self.prepare_model_inputs(micro_batch=micro_batch)
        with self._autocast(), torch.no_grad() if self.is_base_frozen else nullcontext():
            raw_output = self.module(**model_inputs, use_cache=False)
            hidden_states = self._hidden_states.take()
            base_loss = self._base_loss(raw_output, output_args, micro_batch, loss_function)
        packed = self._pack(hidden_states, micro_batch, output_args)
        if forward_only:
            with self._target_weight() as weight:
                speculator_loss, sums = self.speculator_unit(packed, self._whole_sequences(packed, micro_batch, weight))
        else:
            speculator_loss, sums = self.speculator_unit(packed)
        losses = {"speculator_loss": speculator_loss}
        # FSDP averages gradients over all ranks, and each rank holds a different part of the global batch's loss.
        loss = speculator_loss * torch.distributed.get_world_size()
        if base_loss is not None:
            # verl has already scaled its loss by the data-parallel ranks; those of a sequence-parallel group all have
            # the same one.
            losses["base_loss"] = base_loss / torch.distributed.get_world_size()
            loss = base_loss + self.model_config.speculator_loss_coeff * loss
        self._sums.record(sums, **losses)
        return loss, {"model_output": {}, "loss": 0.0, "metrics": {}}

    def _autocast(self) -> Any:
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)

    def _base_loss(
        self, raw_output: Any, output_args: dict[str, Any], micro_batch: TensorDict, loss_function: Callable
    ) -> Tensor | None:
        if self.is_base_frozen:
            return None
        model_output = self.prepare_model_outputs(
            output=raw_output, output_args=output_args, micro_batch=micro_batch, logits_processor_func=loss_function
        )
        loss, _ = loss_function(model_output=model_output, data=micro_batch, dp_group=self.get_data_parallel_group())
        return loss

    def _pack(self, hidden_states: Tensor, micro_batch: TensorDict, output_args: dict[str, Any]) -> PackedHiddenStates:
        input_ids, cu_seqlens = micro_batch["input_ids"].values(), micro_batch["input_ids"].offsets()
        loss_mask = micro_batch["loss_mask"].values()
        if not tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
            hidden_states = drop_padding(hidden_states, cu_seqlens)
        elif self.use_ulysses_sp:
            group = self.ulysses_parallel_group
            hidden_states = gather_sequence(hidden_states.squeeze(0), group, output_args["pad_size"])
            rank, size = torch.distributed.get_rank(group), self.ulysses_sequence_parallel_size
            loss_mask = share_of_targets(loss_mask, rank, size)
        else:
            hidden_states = hidden_states.squeeze(0)[: input_ids.shape[0]]
        if self.is_base_frozen or self.model_config.detach_hidden_states:
            hidden_states = hidden_states.detach()
        return PackedHiddenStates(
            hidden_states=hidden_states.to(self._compute_dtype),
            input_ids=input_ids,
            loss_mask=loss_mask,
            cu_seqlens=cu_seqlens,
            head_counts=self._sums.head_counts,
        )

    def _target_weight(self) -> AbstractContextManager[Tensor | None]:
        """The base's vocabulary matrix [V, H], or None where its distribution is not measured."""
        if self._frozen_head is not None:
            return self._frozen_head.gathered()
        # FSDP1 flattens the matrix into a parameter of its own.
        can_gather = not self.is_base_frozen and isinstance(self.module, FSDPModule)
        return gathered_head(self.module) if self._has_plain_head and can_gather else nullcontext()

    def _whole_sequences(
        self, packed: PackedHiddenStates, micro_batch: TensorDict, lm_head_weight: Tensor | None
    ) -> PackedHiddenStates:
        """The batch with answers uncut: the ranks of a sequence-parallel group, which all hold it, take turns."""
        loss_mask = micro_batch["loss_mask"].values()
        if self.use_ulysses_sp:
            rank, size = torch.distributed.get_rank(self.ulysses_parallel_group), self.ulysses_sequence_parallel_size
            loss_mask = share_of_sequences(loss_mask, packed.cu_seqlens, rank, size)
        return dataclasses.replace(packed, loss_mask=loss_mask, lm_head_weight=lm_head_weight)

    @contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> Iterator[None]:
        defer = self.engine_config.use_no_sync_for_gradient_accumulation and not is_last_micro_batch
        base = (
            nullcontext()
            if self.is_base_frozen
            else super()._gradient_sync_context(is_last_micro_batch=is_last_micro_batch)
        )
        cast(FSDPModule, self.speculator_unit).set_requires_gradient_sync(not defer)
        with base:
            yield

    def optimizer_step(self) -> float:
        max_norm = self.optimizer_config.clip_grad
        grad_norm = self._clip_gradients(max_norm)
        if torch.isfinite(grad_norm):
            self.optimizer.step()
        else:
            print(f"WARN: grad_norm is not finite: {grad_norm}; the step is skipped")
            self.optimizer.zero_grad()
        return grad_norm.item()

    def _clip_gradients(self, max_norm: float) -> Tensor:
        """Clip by the norm over everything that trains, and return that norm."""
        sharded = list(self.speculator_unit.parameters())
        flat: list[nn.Parameter] = []
        if not self.is_base_frozen:
            (sharded if isinstance(self.module, FSDPModule) else flat).extend(self.module.parameters())
        if not flat:
            return _whole(fsdp2_clip_grad_norm_(sharded, max_norm=max_norm))
        # FSDP1's flat parameters know their total norm only through their own method.
        assert isinstance(self.module, FullyShardedDataParallel)
        norms = [self.module.clip_grad_norm_(float("inf")), _whole(fsdp2_clip_grad_norm_(sharded, float("inf")))]
        total = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for parameter in (*sharded, *flat):
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        return total

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
        if not self.is_base_frozen:
            save_base_model(folder, self.module, self.model_config)
        save_training_state(folder, self._trained(), self.optimizer, self.lr_scheduler, self._trained_base())
        torch.distributed.barrier()

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False, **kwargs: Any
    ) -> None:
        folder = Path(local_path)
        load_speculator(folder, self.speculator_unit, PREFIX)
        load_training_state(folder, self._trained(), self.optimizer, self.lr_scheduler, self._trained_base())
        torch.distributed.barrier()

    def _trained_base(self) -> nn.Module | None:
        return None if self.is_base_frozen else self.module

    def _trained(self) -> nn.Module:
        if self.is_base_frozen:
            return self.speculator_unit
        return nn.ModuleDict({"base": self.module, "unit": self.speculator_unit})


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
