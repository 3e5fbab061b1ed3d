"""A step of the Megatron engine: hidden states out of Megatron's schedules, and the speculator on them.

Checked on verl 0.9.1, megatron-core 0.16.1.

The tensor-, context- and pipeline-parallel ranks that hold the same batch divide its loss, each for some of the trained
tokens: an equal part of the vocabulary product for every rank, those of earlier pipeline stages too, and no
communication within it.

A frozen base runs forward only, all micro-batches through the pipeline first. A base that trains needs the gradient of
the loss within the pipeline's schedule: there the ranks of the last stage alone compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from verl_speculator.engine.hidden_states import SeenStates
from verl_speculator.engine.megatron.hidden_states import (
    StageStates,
    broadcast_from_stage,
    full_matrix,
    record_output_layer_input,
    replace_output_layer,
    scale_gradient,
)
from verl_speculator.engine.speculator_engine import SpeculatorEngine
from verl_speculator.engine.target_head import target_head
from verl_speculator.errors import ConfigError
from verl_speculator.losses import PackedHiddenStates, TargetHead


class _Forwarded(NamedTuple):
    """A micro-batch that has been through the pipeline."""

    micro_batch: TensorDict
    states: dict[int, Tensor]  # of this stage, each [T, H]
    base_loss: Tensor


class MegatronSpeculatorStep(SpeculatorEngine, MegatronEngineWithLMHead):
    """What happens in a step; the engine itself builds the parts before the first one."""

    # In joint training the last pipeline stage runs it while the others do not.
    _gathers_layers_apart = False
    _seen: StageStates
    # The pipeline stage that has the states of each key.
    _stage_of: dict[int, int]
    # Collected while a schedule runs forward only; None while it trains.
    _forwarded: list[_Forwarded] | None = None

    def _watch_base(self) -> None:
        """Hook what a step needs, and let go of the output layer of a frozen base.

        Raises:
            ConfigError: in joint training the loss would need states of earlier pipeline stages.
        """
        model = unwrap_model(self.module[-1])
        layer_ids = self._needs.aux_hidden_state_layer_ids
        num_layers = self.model_config.hf_config.get_text_config().num_hidden_layers
        self._seen = StageStates(model, layer_ids, num_layers)
        if mpu.is_pipeline_last_stage():
            self._seen.keys.append(SeenStates.LAST)
            watch = replace_output_layer if self.is_base_frozen else record_output_layer_input
            watch(model, self._seen)
        stages: list[Any] = [None] * mpu.get_pipeline_model_parallel_world_size()
        torch.distributed.all_gather_object(stages, self._seen.keys, group=mpu.get_pipeline_model_parallel_group())
        self._stage_of = {key: stage for stage, keys in enumerate(stages) for key in keys}
        if self.is_base_frozen:
            return
        asks = f"model.freeze_base_model=false: a {type(self.adapter).__name__} asks for the states after layer"
        if layer_ids and self.tf_config.recompute_granularity == "full" and not self.model_config.detach_hidden_states:
            raise ConfigError(
                f"{asks} {layer_ids[0]}, to which its gradient does not come back where whole layers are recomputed: "
                "set engine.override_transformer_config.recompute_granularity=selective, or "
                "model.detach_hidden_states=true"
            )
        elsewhere = [layer_id for layer_id in layer_ids if self._stage_of[layer_id] != len(stages) - 1]
        if elsewhere:
            raise ConfigError(
                f"{asks} {elsewhere[0]}, which in joint training do not come from an earlier pipeline stage to its "
                "loss: set engine.pipeline_model_parallel_size=1"
            )

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable, forward_only: bool = False
    ) -> dict[str, Any]:
        self._begin_step(data)
        if self.is_base_frozen or forward_only:
            self._forwarded = []
            with torch.no_grad():
                super().forward_backward_batch(data, loss_function, forward_only=True)
            with self._target_gathered(forward_only):
                self._run_speculator_on(self._forwarded, forward_only)
        else:
            self._forwarded = None
            with self._target_gathered(forward_only), self._gathered_through_schedule():
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
        with self._seen.recording():
            if self.is_base_frozen:
                output, postprocess = self._forward_frozen(micro_batch, model), _no_loss
            else:
                output, postprocess = super().forward_step(
                    iter([micro_batch]), model, logits_processor_func, postprocess_micro_batch_func
                )
        if self._forwarded is not None and (self.is_base_frozen or not mpu.is_pipeline_last_stage()):
            self._forwarded.append(_Forwarded(micro_batch, self._states_of_stage(micro_batch), _zero()))
        return output, postprocess

    def _forward_frozen(self, micro_batch: TensorDict, model: nn.Module) -> Any:
        config = self.engine_config
        return get_mcore_engine_forward_fn(self.model_config.hf_config)(
            model,
            micro_batch["input_ids"],
            {},
            pad_token_id=self.model_config.tokenizer.pad_token_id,
            data_format="thd" if config.use_remove_padding else "bshd",
            forced_max_seqlen=tu.get_non_tensor_data(data=micro_batch, key="forced_max_seqlen", default=None),
            pad_to_length_bucket=config.pad_to_length_bucket if config.pad_to_length else None,
        )

    def _states_of_stage(self, micro_batch: TensorDict) -> dict[int, Tensor]:
        keys = self._seen.keys
        return dict(zip(keys, self._seen.take_packed(keys, micro_batch["input_ids"]), strict=True))

    def postprocess_micro_batch_func(
        self, output: dict, data: TensorDict, forward_only: bool, loss_function: Callable, local_cp_size: Any = None
    ) -> tuple[Tensor, dict]:
        loss, result = super().postprocess_micro_batch_func(output, data, forward_only, loss_function, local_cp_size)
        # verl has scaled its loss by the data-parallel ranks; those of a model-parallel group all have the same one.
        base_loss = _zero() + result["loss"] / self.get_data_parallel_size() * self.is_mp_src_rank_with_outputs()
        states = self._states_of_stage(data)
        if self._forwarded is not None:
            self._forwarded.append(_Forwarded(data, states, base_loss))
            return loss, {}
        world_size = torch.distributed.get_world_size()
        # The speculator's gradients are averaged over all ranks, and the base's over the data-parallel ones.
        scale = self.get_data_parallel_size() / world_size
        packed = self._pack([scale_gradient(states[key], scale) for key in self._state_keys()], data)
        speculator_loss, sums = self._run_speculator(packed, forward_only)
        self._sums.record(sums, speculator_loss, base_loss)
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
        self._sums.record(sums, loss, _zero())
        unit.reshard()

    def _no_data(self) -> PackedHiddenStates:
        """One token that trains nothing."""
        token = torch.zeros(1, dtype=torch.int64, device=get_device_id())
        num_states = len(self._needs.aux_hidden_state_layer_ids)
        size = self.tf_config.hidden_size
        states = torch.zeros(1, (1 + num_states) * size, dtype=self._compute_dtype, device=token.device)
        return PackedHiddenStates(
            hidden_states=states[:, :size],
            input_ids=token,
            loss_mask=token,
            cu_seqlens=torch.tensor([0, 1], device=token.device),
            lm_head_weight=self._plain_target_weight,
            target_head=self._target,
            head_counts=self._sums.head_counts,
            aux_hidden_states=states[:, size:] if num_states else None,
            position_ids=token if self._needs.position_ids else None,
        )

    def _run_speculator_on(self, forwarded: list[_Forwarded], forward_only: bool) -> None:
        """The loss, and unless `forward_only` its gradient, of all micro-batches, on every rank for its own share."""
        while forwarded:
            micro_batch, states, base_loss = forwarded.pop(0)
            packed = self._pack(
                [self._on_every_stage(key, states, micro_batch) for key in self._state_keys()], micro_batch
            )
            self._gather_for(is_last=not forwarded)
            loss, sums = self._run_speculator(packed, forward_only)
            if not forward_only:
                # FSDP averages gradients over all ranks, and each has a different part of the loss.
                (loss * torch.distributed.get_world_size()).backward()
            self._sums.record(sums, loss, None if self.is_base_frozen else base_loss)
        # A forward pass without a backward one leaves it gathered.
        cast(FSDPModule, self.speculator_unit).reshard()

    def _on_every_stage(self, key: int, states: dict[int, Tensor], micro_batch: TensorDict) -> Tensor:
        shape = micro_batch["input_ids"].values().shape[0], self.tf_config.hidden_size
        if key in states:
            tensor = states[key].to(self.param_dtype).contiguous()
        else:
            tensor = torch.empty(shape, dtype=self.param_dtype, device=get_device_id())
        broadcast_from_stage(tensor, self._stage_of[key])
        return tensor

    def _rank_among_sharers(self) -> tuple[int, int]:
        """In joint training the last stage alone has the batch."""
        rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        rank += size * mpu.get_context_parallel_rank()
        size *= mpu.get_context_parallel_world_size()
        if self._forwarded is not None:
            rank += size * mpu.get_pipeline_model_parallel_rank()
            size *= mpu.get_pipeline_model_parallel_world_size()
        return rank, size

    def _trained_head(self) -> TargetHead:
        weight = full_matrix(unwrap_model(self.module[-1]), "output", *self._matrix_layout())
        return target_head(self.model_config.hf_config, weight)

    def _base_matrices(self, base: nn.Module) -> tuple[Tensor, Tensor]:
        embed_tokens = full_matrix(unwrap_model(self.module[0]), "embedding", *self._matrix_layout())
        return embed_tokens, self._trained_head().weight

    def _matrix_layout(self) -> tuple[tuple[int, int], torch.dtype, Any]:
        config = self.model_config.hf_config.get_text_config()
        return (config.vocab_size, config.hidden_size), self.param_dtype, get_device_id()


def _no_loss(output: Any) -> tuple[Tensor, dict]:
    """What a schedule that runs a frozen base does with its output."""
    return _zero(), {}


def _zero() -> Tensor:
    return torch.zeros((), device=get_device_id())
