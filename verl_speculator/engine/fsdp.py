"""verl's FSDP engine with a speculator beside its language model. Checked on verl 0.9.1.

verl wraps the base model as ever; the speculator is an FSDP2 unit on the same mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import prepare_micro_batches

from verl_speculator.engine.base_export import save_base_model
from verl_speculator.engine.cached_states import without_layers
from verl_speculator.engine.compilation import compile_base
from verl_speculator.engine.gathering import fits_gathered
from verl_speculator.engine.hidden_states import (
    drop_padding,
    output_embeddings,
    record_layers,
    record_lm_head_input,
    replace_lm_head,
)
from verl_speculator.engine.model_config import MODEL_TYPE
from verl_speculator.engine.optimizer_config import adam_arguments, base_lr
from verl_speculator.engine.packed_attention import attend_by_sequence
from verl_speculator.engine.sequence_parallel import gather_sequence
from verl_speculator.engine.speculator_engine import SpeculatorEngine, full_norm
from verl_speculator.engine.target_head import FrozenHead, full_head, target_head
from verl_speculator.losses import TargetHead


class FSDPSpeculatorEngine(SpeculatorEngine, FSDPEngineWithLMHead):
    """Where under FSDP the speculator finds what it needs of the base, whatever the engine does with both."""

    def _base_modules(self) -> list[nn.Module]:
        return [self.module]

    def _trained_head(self) -> TargetHead:
        return full_head(self.module)

    def _base_matrices(self, base: Any) -> tuple[Tensor, Tensor]:
        return base.get_input_embeddings().weight, output_embeddings(base).weight

    def _why_no_target_of_strategy(self) -> str | None:
        if not self.is_base_frozen and self.engine_config.strategy == "fsdp":
            return "engine.strategy=fsdp flattens the vocabulary matrix of a base that trains"
        return None

    def _packed_states(self, micro_batch: TensorDict, output_args: dict[str, Any]) -> list[Tensor]:
        """What the forward pass recorded, each [T, H], out of the layout in which the base ran."""
        # Side by side, so that padding is dropped and slices are gathered once.
        recorded = self._seen.take(self._state_keys())
        states = recorded[0] if len(recorded) == 1 else torch.cat(recorded, dim=-1)
        cu_seqlens = micro_batch["input_ids"].offsets()
        if not tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
            states = drop_padding(states, cu_seqlens)
        elif self.use_ulysses_sp:
            states = gather_sequence(states.squeeze(0), self.ulysses_parallel_group, output_args["pad_size"])
        else:
            states = states.squeeze(0)[: micro_batch["input_ids"].values().shape[0]]
        return list(states.chunk(len(recorded), dim=-1))

    def _rank_among_sharers(self) -> tuple[int, int]:
        if not self.use_ulysses_sp:
            return 0, 1
        return torch.distributed.get_rank(self.ulysses_parallel_group), self.ulysses_sequence_parallel_size


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu"])
@EngineRegistry.register(model_type=MODEL_TYPE, backend="fsdp2", device="cpu")
class FSDPEngineWithLMHeadAndSpeculator(FSDPSpeculatorEngine):
    """Trains a speculator on a frozen base model, or both together (`model.freeze_base_model=false`)."""

    # Building: verl calls these in this order.

    def _build_module(self) -> nn.Module:
        # verl's loader accepts its own two model types only.
        self.model_config.model_type = "language_model"
        settings = self._states_cache_settings
        reads_all = settings is not None and settings.is_complete
        try:
            with without_layers(self.model_config.hf_config) if reads_all else nullcontext():
                return super()._build_module()
        finally:
            self.model_config.model_type = MODEL_TYPE

    def _build_fsdp_module(self, module: Any) -> nn.Module:
        precision = self.engine_config.mixed_precision or {}
        base_dtype = PrecisionType.to_dtype(precision.get("param_dtype", "bf16"))
        self._compute_dtype = PrecisionType.to_dtype(self.model_config.speculator_dtype or base_dtype)
        if self.use_remove_padding and self.model_config.attend_by_sequence:
            attention = attend_by_sequence(module)
            if torch.distributed.get_rank() == 0:
                print(attention)
        head = output_embeddings(module)
        self._build_speculator(module, self._why_no_target_of_strategy())
        if self._needs_frozen_head:
            self._frozen_head = FrozenHead(target_head(self.model_config.hf_config, head.weight, head.bias))
        if self.is_base_frozen:
            replace_lm_head(module, self._seen)
            module.gradient_checkpointing_disable()
            module.requires_grad_(False)
            if self.model_config.compile:
                compile_base(module)
        else:
            record_lm_head_input(module, self._seen)
        if self.cached_states is None or not self.cached_states.cache.is_complete:
            record_layers(module, self._needs.aux_hidden_state_layer_ids, self._seen)
        if self.engine_config.reshard_after_forward == "auto":
            reshards = not (self.is_base_frozen and fits_gathered(module, base_dtype))
            self.engine_config = dataclasses.replace(self.engine_config, reshard_after_forward=reshards)
        module = super()._build_fsdp_module(module)
        self._shard_speculator(self.device_mesh, PrecisionType.to_dtype(precision.get("reduce_dtype", "fp32")))
        return module

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        params = list(self.adapter.get_optimizer_params())
        if not self.is_base_frozen:
            base = [parameter for parameter in module.parameters() if parameter.requires_grad]
            groups = params if params and isinstance(params[0], dict) else [{"params": params}]
            # verl reports the first group's learning rate, which is to be the speculator's.
            params = [*groups, {"params": base, "lr": base_lr(self.optimizer_config)}]
        config = self.optimizer_config
        if config.optimizer_impl == "torch.optim" and config.optimizer in ("Adam", "AdamW"):
            given = config.override_optimizer_config or {}
            config = dataclasses.replace(config, override_optimizer_config={**adam_arguments(), **given})
        return build_optimizer(params, config)

    # A step

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable, forward_only: bool = False
    ) -> dict[str, Any]:
        self._begin_step(data)
        with self._target_gathered(forward_only):
            super().forward_backward_batch(data, loss_function, forward_only)
        # A forward pass without a backward one leaves it gathered.
        cast(FSDPModule, self.speculator_unit).reshard()
        return self._sums.output(data, self.model_config.speculator_loss_coeff)

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        in_host_memory, micro_batch = micro_batch, micro_batch.to(get_device_id())
        if self.cached_states is None:
            states, base_loss = self._run_base(micro_batch, loss_function)
        else:
            base_loss = None
            states = self.cached_states.states(in_host_memory, partial(self._states_of, micro_batch))
        speculator_loss, sums = self._run_speculator(self._pack(states, micro_batch), forward_only)
        if self.cached_states is not None:
            sums = {**sums, **self.cached_states.sums}
        # FSDP averages gradients over all ranks, and each rank holds a different part of the global batch's loss.
        world_size = torch.distributed.get_world_size()
        loss = speculator_loss * world_size
        if base_loss is not None:
            loss = base_loss + self.model_config.speculator_loss_coeff * loss
            # verl has already scaled its loss by the data-parallel ranks; those of a sequence-parallel group all have
            # the same one.
            base_loss = base_loss / world_size
        self._sums.record(sums, speculator_loss, base_loss)
        return loss, {"model_output": {}, "loss": 0.0, "metrics": {}}

    def _run_base(self, micro_batch: TensorDict, loss_function: Callable | None) -> tuple[list[Tensor], Tensor | None]:
        """What the adapter sees of the base's forward pass, each [T, H]; and the base's loss, if it trains."""
        model_inputs, output_args = self.prepare_model_inputs(micro_batch=micro_batch)
        with self._autocast(), torch.no_grad() if self.is_base_frozen else nullcontext():
            with self._seen.recording():
                raw_output = self.module(**model_inputs, use_cache=False)
            base_loss = self._base_loss(raw_output, output_args, micro_batch, loss_function)
        return self._packed_states(micro_batch, output_args), base_loss

    def _states_of(self, micro_batch: TensorDict) -> list[Tensor]:
        return self._run_base(micro_batch, None)[0]

    @torch.no_grad()
    def store_states(self, data: TensorDict) -> None:
        """Compute and keep the hidden states of a batch, unless they are kept already; every rank calls this.

        Args:
            data: This rank's rows, as for `infer_batch`.
        """
        assert self.cached_states is not None
        self.cached_states.begin_step(data)
        if self.cached_states.reads_step:
            return
        tu.assign_non_tensor(data, sp_size=self.ulysses_sequence_parallel_size)
        micro_batches, _ = prepare_micro_batches(
            data, dp_group=self.get_data_parallel_group(), same_micro_num_in_dp=True
        )
        with self.eval_mode():
            for micro_batch in micro_batches:
                on_device = micro_batch.to(get_device_id())
                self.cached_states.states(micro_batch, partial(self._states_of, on_device))

    def _autocast(self) -> Any:
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)

    def _base_loss(
        self, raw_output: Any, output_args: dict[str, Any], micro_batch: TensorDict, loss_function: Callable | None
    ) -> Tensor | None:
        if self.is_base_frozen or loss_function is None:
            return None
        model_output = self.prepare_model_outputs(
            output=raw_output, output_args=output_args, micro_batch=micro_batch, logits_processor_func=loss_function
        )
        loss, _ = loss_function(model_output=model_output, data=micro_batch, dp_group=self.get_data_parallel_group())
        return loss

    @contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> Iterator[None]:
        self._gather_for(is_last=is_last_micro_batch)
        if self.is_base_frozen:
            yield
            return
        with super()._gradient_sync_context(is_last_micro_batch=is_last_micro_batch):
            yield

    def optimizer_step(self) -> float:
        grad_norm = self._clip_gradients(self.optimizer_config.clip_grad)
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
            return full_norm(fsdp2_clip_grad_norm_(sharded, max_norm=max_norm))
        # FSDP1's flat parameters know their total norm only through their own method.
        assert isinstance(self.module, FullyShardedDataParallel)
        norms = [self.module.clip_grad_norm_(float("inf")), full_norm(fsdp2_clip_grad_norm_(sharded, float("inf")))]
        total = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for parameter in (*sharded, *flat):
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        return total

    # Checkpoints

    def _training_state(self) -> tuple[nn.Module, torch.optim.Optimizer, Any, nn.Module | None]:
        base = None if self.is_base_frozen else self.module
        trained = self.speculator_unit if base is None else nn.ModuleDict({"base": base, "unit": self.speculator_unit})
        return trained, self.optimizer, self.lr_scheduler, base

    def _save_base(self, folder: Path) -> None:
        save_base_model(folder, self.module, self.model_config, self._base_dtype)
