"""verl's Megatron engine with a speculator beside its language model. Checked on verl 0.9.1, megatron-core 0.16.1.

The speculator is no part of Megatron's model. It is the FSDP2 unit of the FSDP engine, sharded over all ranks, so its
optimizer and its checkpoints do not depend on how the base is laid out. Megatron runs the base and yields the hidden
states of its last stage. The tensor-, context- and pipeline-parallel ranks that hold the same batch then share out its
loss, each for some of the trained tokens: an equal part of the vocabulary product for every rank, those of earlier
pipeline stages too, and no communication within it.

A frozen base runs forward only, all micro-batches through the pipeline first. A base that trains needs the gradient of
the loss within the pipeline's schedule: there the ranks of the last stage alone compute it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from megatron.core import parallel_state as mpu
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from verl.models.mcore import get_mcore_engine_forward_fn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_
from verl.utils.megatron.optimizer import get_megatron_optimizer_param_scheduler
from verl.utils.megatron_utils import unwrap_model
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import (
    EngineEvalModeCtx,
    EngineTrainModeCtx,
    MegatronEngineWithLMHead,
)

from verl_speculator.adapters import SpeculatorAdapter, build_speculator_adapter
from verl_speculator.checkpoint.training_state import (
    load_speculator,
    load_training_state,
    save_speculator,
    save_training_state,
)
from verl_speculator.engine.hidden_states import LastHiddenStates, share_of_sequences, share_of_targets
from verl_speculator.engine.megatron_base import BaseStep, load_base, save_base
from verl_speculator.engine.megatron_hidden_states import (
    broadcast_from_last_stage,
    record_output_layer_input,
    replace_output_layer,
    scale_gradient,
    whole_hidden_states,
    whole_output_weight,
)
from verl_speculator.engine.model_config import MODEL_TYPE
from verl_speculator.engine.speculator_unit import PREFIX, SpeculatorUnit, build_speculator, shard
from verl_speculator.engine.step_sums import StepSums
from verl_speculator.engine.target_head import FrozenHead, has_plain_logits
from verl_speculator.losses import PackedHiddenStates


class _TrainMode(EngineTrainModeCtx):
    def __enter__(self) -> None:
        super().__enter__()
        self.engine.set_train_mode(True)


class _EvalMode(EngineEvalModeCtx):
    def __enter__(self) -> None:
        super().__enter__()
        self.engine.set_train_mode(False)


class _Forwarded(NamedTuple):
    """A micro-batch that has been through the pipeline."""

    micro_batch: TensorDict
    hidden_states: Tensor | None  # [T, H]; None before the last stage
    base_loss: Tensor


@EngineRegistry.register(model_type=MODEL_TYPE, backend="megatron", device=["cuda", "npu"])
class MegatronEngineWithLMHeadAndSpeculator(MegatronEngineWithLMHead):
    """Trains a speculator on a frozen base model, or both together (``model.freeze_base_model=false``).

    ``infer_batch`` computes the same losses and metrics without training. A step's metrics are sums and counts over
    the whole global batch, the same on every rank.
    """

    adapter: SpeculatorAdapter
    speculator_unit: SpeculatorUnit
    speculator_optimizer: torch.optim.Optimizer
    speculator_scheduler: Any
    _frozen_head: FrozenHead | None = None
    _sums: StepSums
    _forwarded: list[_Forwarded] | None = None

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

    @property
    def is_base_frozen(self) -> bool:
        return self.model_config.freeze_base_model

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
            self._hidden_states: LastHiddenStates = record_output_layer_input(model)

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

    def _output_weight(self) -> Tensor:
        config = self.model_config.hf_config.get_text_config()
        shape = (config.vocab_size, config.hidden_size)
        return whole_output_weight(unwrap_model(self.module[-1]), shape, self.param_dtype, get_device_id())

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

    # A step

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable, forward_only: bool = False
    ) -> dict[str, Any]:
        self._sums = StepSums(self.adapter, data, self.get_data_parallel_group())
        if self.is_base_frozen or forward_only:
            self._forwarded = []
            with torch.no_grad():
                super().forward_backward_batch(data, loss_function, forward_only=True)
            self._run_speculator(self._forwarded, forward_only)
        else:
            self._forwarded = None
            with self._gathered_through_schedule():
                super().forward_backward_batch(data, loss_function)
        return self._sums.output(data, self.model_config.speculator_loss_coeff)

    def forward_step(
        self,
        batch_iter: Iterator[TensorDict],
        model: nn.Module,
        logits_processor_func: Callable,
        postprocess_micro_batch_func: Callable,
    ) -> tuple[Any, Callable]:
        micro_batch = next(batch_iter).to(get_device_id())
        if self.is_base_frozen:
            return self._forward_frozen(micro_batch, model)
        if self._forwarded is not None and not mpu.is_pipeline_last_stage():
            self._forwarded.append(_Forwarded(micro_batch, None, _zero()))
        return super().forward_step(iter([micro_batch]), model, logits_processor_func, postprocess_micro_batch_func)

    def _forward_frozen(self, micro_batch: TensorDict, model: nn.Module) -> tuple[Any, Callable]:
        config = self.engine_config
        output = get_mcore_engine_forward_fn(self.model_config.hf_config)(
            model,
            micro_batch["input_ids"],
            {},
            pad_token_id=self.model_config.tokenizer.pad_token_id,
            data_format="thd" if config.use_remove_padding else "bshd",
            forced_max_seqlen=tu.get_non_tensor_data(data=micro_batch, key="forced_max_seqlen", default=None),
            pad_to_length_bucket=config.pad_to_length_bucket if config.pad_to_length else None,
        )
        hidden_states = output.values() if mpu.is_pipeline_last_stage() else None
        assert self._forwarded is not None
        self._forwarded.append(_Forwarded(micro_batch, hidden_states, _zero()))
        return output, lambda _: (_zero(), {})

    def _lm_head_logits_processor(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        output = super()._lm_head_logits_processor(*args, **kwargs)
        # verl brings whatever stands beside the log probabilities from Megatron's layout into the batch's.
        hidden_states = whole_hidden_states(self._hidden_states.take(), self.tf_config.sequence_parallel)
        return {**output, "hidden_states": hidden_states}

    def postprocess_micro_batch_func(
        self, output: dict, data: TensorDict, forward_only: bool, loss_function: Callable, local_cp_size: Any = None
    ) -> tuple[Tensor, dict]:
        hidden_states = output.pop("hidden_states").values()
        loss, result = super().postprocess_micro_batch_func(output, data, forward_only, loss_function, local_cp_size)
        # verl has scaled its loss by the data-parallel ranks; those of a model-parallel group all have the same one.
        base_loss = _zero() + result["loss"] / self.get_data_parallel_size() * self.is_mp_src_rank_with_outputs()
        if self._forwarded is not None:
            self._forwarded.append(_Forwarded(data, hidden_states, base_loss))
            return loss, {}
        world_size = torch.distributed.get_world_size()
        # The speculator's gradients are averaged over all ranks, and the base's over the data-parallel ones.
        hidden_states = scale_gradient(hidden_states, self.get_data_parallel_size() / world_size)
        speculator_loss, sums = self.speculator_unit(self._share(self._pack(hidden_states, data)))
        self._record(speculator_loss, sums, base_loss)
        scale = self.model_config.speculator_loss_coeff * world_size * data["num_micro_batch"]
        return loss + scale * speculator_loss, {}

    @contextmanager
    def _gathered_through_schedule(self) -> Iterator[None]:
        """Joint training: the last stage runs the speculator at moments that the other stages do not know of.

        So all ranks gather it before the schedule, and add up its gradients in a pass without data after it.
        """
        unit = cast(FSDPModule, self.speculator_unit)
        unit.set_reshard_after_backward(False)
        unit.set_requires_gradient_sync(False)
        unit.unshard()
        yield
        unit.set_requires_gradient_sync(True)
        loss, sums = self.speculator_unit(self._no_data())
        loss.backward()
        self._record(loss, sums, _zero())
        unit.reshard()

    def _no_data(self) -> PackedHiddenStates:
        token = torch.zeros(1, dtype=torch.int64, device=get_device_id())
        return PackedHiddenStates(
            hidden_states=torch.zeros(1, self.tf_config.hidden_size, dtype=self._compute_dtype, device=token.device),
            input_ids=token,
            loss_mask=token,
            cu_seqlens=torch.tensor([0, 1], device=token.device),
            head_counts=self._sums.head_counts,
        )

    def _run_speculator(self, forwarded: list[_Forwarded], forward_only: bool) -> None:
        """The loss, and unless ``forward_only`` its gradient, of all micro-batches, on every rank for its own share."""
        unit = cast(FSDPModule, self.speculator_unit)
        unit.set_reshard_after_backward(False)
        with self._target_weight() if forward_only else nullcontext() as target_weight:
            while forwarded:
                micro_batch, hidden_states, base_loss = forwarded.pop(0)
                packed = self._pack(self._on_every_stage(hidden_states, micro_batch), micro_batch)
                if forward_only:
                    whole = self._whole_sequences(packed, micro_batch, target_weight)
                    loss, sums = self.speculator_unit(self._share(packed), whole)
                else:
                    unit.set_requires_gradient_sync(not forwarded)
                    loss, sums = self.speculator_unit(self._share(packed))
                    # FSDP averages gradients over all ranks, and each has a different part of the loss.
                    (loss * torch.distributed.get_world_size()).backward()
                self._record(loss, sums, base_loss)
        unit.reshard()

    def _on_every_stage(self, hidden_states: Tensor | None, micro_batch: TensorDict) -> Tensor:
        if hidden_states is None:
            shape = micro_batch["input_ids"].values().shape[0], self.tf_config.hidden_size
            hidden_states = torch.empty(shape, dtype=self.param_dtype, device=get_device_id())
        hidden_states = hidden_states.contiguous()
        broadcast_from_last_stage(hidden_states)
        return hidden_states

    def _pack(self, hidden_states: Tensor, micro_batch: TensorDict) -> PackedHiddenStates:
        if self.is_base_frozen or self.model_config.detach_hidden_states:
            hidden_states = hidden_states.detach()
        return PackedHiddenStates(
            hidden_states=hidden_states.to(self._compute_dtype),
            input_ids=micro_batch["input_ids"].values(),
            loss_mask=micro_batch["loss_mask"].values(),
            cu_seqlens=micro_batch["input_ids"].offsets(),
            head_counts=self._sums.head_counts,
        )

    def _share(self, packed: PackedHiddenStates) -> PackedHiddenStates:
        rank, size = self._place_among_sharers()
        return dataclasses.replace(packed, loss_mask=share_of_targets(packed.loss_mask, rank, size))

    def _place_among_sharers(self) -> tuple[int, int]:
        """This rank and the size of the group that shares out a batch: in joint training it has one stage only."""
        rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        rank += size * mpu.get_context_parallel_rank()
        size *= mpu.get_context_parallel_world_size()
        if self._forwarded is not None:
            rank += size * mpu.get_pipeline_model_parallel_rank()
            size *= mpu.get_pipeline_model_parallel_world_size()
        return rank, size

    def _whole_sequences(
        self, packed: PackedHiddenStates, micro_batch: TensorDict, lm_head_weight: Tensor | None
    ) -> PackedHiddenStates:
        loss_mask = share_of_sequences(packed.loss_mask, packed.cu_seqlens, *self._place_among_sharers())
        return dataclasses.replace(packed, loss_mask=loss_mask, lm_head_weight=lm_head_weight)

    def _target_weight(self) -> Any:
        """The base's vocabulary matrix [V, H], or None where its distribution is not measured."""
        if self._frozen_head is not None:
            return self._frozen_head.gathered()
        return nullcontext(self._output_weight() if self._measures_sampling else None)

    def _record(self, speculator_loss: Tensor, sums: dict[str, Tensor], base_loss: Tensor) -> None:
        losses = {"speculator_loss": speculator_loss}
        if not self.is_base_frozen:
            losses["base_loss"] = base_loss
        self._sums.record(sums, **losses)

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


def _zero() -> Tensor:
    return torch.zeros((), device=get_device_id())


def _whole(norm: Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
