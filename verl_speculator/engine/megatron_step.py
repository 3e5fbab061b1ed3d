"""A step of the Megatron engine: hidden states out of Megatron's schedules, and the speculator on them.

Checked on verl 0.9.1, megatron-core 0.16.1.

The tensor-, context- and pipeline-parallel ranks that hold the same batch share out its loss, each for some of the
trained tokens: an equal part of the vocabulary product for every rank, those of earlier pipeline stages too, and no
communication within it.

A frozen base runs forward only, all micro-batches through the pipeline first. A base that trains needs the gradient of
the loss within the pipeline's schedule: there the ranks of the last stage alone compute it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from megatron.core import parallel_state as mpu
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from verl.models.mcore import get_mcore_engine_forward_fn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from verl_speculator.adapters import SpeculatorAdapter
from verl_speculator.engine.hidden_states import LastHiddenStates, share_of_sequences, share_of_targets
from verl_speculator.engine.megatron_hidden_states import (
    broadcast_from_last_stage,
    scale_gradient,
    whole_hidden_states,
    whole_output_weight,
)
from verl_speculator.engine.speculator_unit import SpeculatorUnit
from verl_speculator.engine.step_sums import StepSums
from verl_speculator.engine.target_head import FrozenHead
from verl_speculator.losses import PackedHiddenStates


class _Forwarded(NamedTuple):
    """A micro-batch that has been through the pipeline."""

    micro_batch: TensorDict
    hidden_states: Tensor | None  # [T, H]; None before the last stage
    base_loss: Tensor


class MegatronSpeculatorStep(MegatronEngineWithLMHead):
    """What happens in a step; the engine itself builds the parts named here before the first one."""

    adapter: SpeculatorAdapter
    speculator_unit: SpeculatorUnit
    _compute_dtype: torch.dtype
    _hidden_states: LastHiddenStates
    _measures_sampling: bool
    _frozen_head: FrozenHead | None = None
    _sums: StepSums
    # Collected while a schedule runs forward only; None while it trains.
    _forwarded: list[_Forwarded] | None = None

    @property
    def is_base_frozen(self) -> bool:
        return self.model_config.freeze_base_model

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

    def _output_weight(self) -> Tensor:
        config = self.model_config.hf_config.get_text_config()
        shape = (config.vocab_size, config.hidden_size)
        return whole_output_weight(unwrap_model(self.module[-1]), shape, self.param_dtype, get_device_id())


def _zero() -> Tensor:
    return torch.zeros((), device=get_device_id())
