"""verl's FSDP engine of a policy, with a speculator that learns from its rollouts. Checked on verl 0.9.1.

The speculator sees what goes into `lm_head` in the forward pass that `update_actor` makes anyway, detached. Its loss
has a backward pass of its own, its gradients are clipped apart, and its optimizer knows its parameters only: what the
policy computes is what verl's own engine computes, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_, load_fsdp_optimizer, offload_fsdp_optimizer
from verl.utils.torch_dtypes import PrecisionType
from verl.utils.torch_functional import get_constant_schedule_with_warmup
from verl.workers.config import FSDPOptimizerConfig
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_speculator.adapters import SpeculatorAdapter
from verl_speculator.adapters.finding import adapter_for
from verl_speculator.adapters.following import KEY, FollowingSpeculator
from verl_speculator.adapters.settings import SECTION, base_model_sizes, config_settings
from verl_speculator.checkpoint.layout import RESUME_FOLDER
from verl_speculator.checkpoint.training_state import load_training_state, save_speculator, save_training_state
from verl_speculator.engine.fsdp import FSDPSpeculatorEngine
from verl_speculator.engine.hidden_states import record_layers, record_lm_head_input
from verl_speculator.engine.kept_steps import KeptSteps
from verl_speculator.engine.optimizer_config import adam_arguments
from verl_speculator.engine.paired_monitor import Adaptation, PairedMonitor
from verl_speculator.engine.policy_config import PolicyEngineConfig
from verl_speculator.engine.response_tokens import MASK_KEY, at_most, response_mask
from verl_speculator.engine.sequence_parallel import share_of_sequences
from verl_speculator.engine.speculator_engine import full_norm
from verl_speculator.engine.step_sums import SUMS_KEY
from verl_speculator.errors import CheckpointError, ConfigError, naming
from verl_speculator.models import ChainSpeculator, ChainSpeculatorConfig, SpeculatorConfig
from verl_speculator.models.serialization import PREFIX
from verl_speculator.platforms import cpu

POLICY_MODEL_TYPE = "policy_with_speculator"
# Beside what training goes on from: whether following is switched off, and what that was judged by.
ADAPTATION_FILE = f"{RESUME_FOLDER}/adaptation.json"


@EngineRegistry.register(model_type=POLICY_MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu"])
@EngineRegistry.register(model_type=POLICY_MODEL_TYPE, backend="fsdp2", device="cpu")
class FSDPPolicyEngine(FSDPEngineWithLMHead):
    """verl's engine of a language model. An actor's has a speculator; the reference policy's is this one, plain."""

    engine_config: Any

    def __new__(cls, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> FSDPPolicyEngine:
        return super().__new__(cls if engine_config.forward_only else FSDPPolicyEngineWithSpeculator)

    def _build_module(self) -> nn.Module:
        # verl's loader accepts its own two model types only.
        self.model_config.model_type = "language_model"
        return super()._build_module()

    def _build_fsdp_module(self, module: Any) -> nn.Module:
        if not (cpu.is_active() and self.engine_config.forward_only):
            return super()._build_fsdp_module(module)
        # verl offloads a reference policy to pinned memory, which there is none of without an accelerator.
        config = self.engine_config
        self.engine_config = dataclasses.replace(config, forward_only=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = config


class FSDPPolicyEngineWithSpeculator(FSDPSpeculatorEngine, FSDPPolicyEngine):
    """Attributes:
    speculator_optimizer: The speculator's own.
    speculator_scheduler: Steps once in a trainer step, whether or not the speculator learns in it.
    """

    _adapter_key = f"{KEY}.path"
    # In the batch at hand; and whether the monitor has seen one of this trainer step: those after it have rows that
    # the live speculator may have learnt from.
    _learns = _observes = _has_observed = False
    _pad_size = 0
    _monitor: PairedMonitor | None = None
    _kept: KeptSteps | None = None

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(engine_config, PolicyEngineConfig):
            target = f"{PolicyEngineConfig.__module__}.{PolicyEngineConfig.__qualname__}"
            raise ConfigError(
                f"actor_rollout_ref.model.model_type={POLICY_MODEL_TYPE} needs the settings of its speculator: set "
                f"actor_rollout_ref.actor.fsdp_config._target_={target} and {KEY}.path"
            )
        self._following = FollowingSpeculator.of(engine_config.speculator)
        self._adaptation = Adaptation() if self._following.adaptive else None
        super().__init__(model_config, engine_config, *args, **kwargs)
        if model_config.use_fused_kernels:
            raise ConfigError(
                "actor_rollout_ref.model.use_fused_kernels=true skips lm_head, whose input a speculator learns from: "
                "leave it off"
            )

    @property
    def _options(self) -> Any:
        return self._following

    # Building: verl calls these in this order.

    def _make_adapter(self) -> SpeculatorAdapter:
        path = self._following.path
        with naming(f"{KEY}.path"):
            config = SpeculatorConfig.from_pretrained(path)
            sizes = base_model_sizes(self._base_as_loaded)
            config.check_fits_base(sizes["input_hidden_dim"], sizes["vocab_size"], f"the speculator in {path!r}")
            adapter_class = adapter_for(config)
        # A chain checks its training settings against its shape.
        shape = config_settings(type(config)) if isinstance(config, ChainSpeculatorConfig) else []
        settings = {name: getattr(config, name) for name in shape}
        try:
            return adapter_class({**settings, **self._following.training})
        except ConfigError as error:
            raise ConfigError(str(error).replace(SECTION, f"{KEY}.training")) from error

    def _build_fsdp_module(self, module: Any) -> nn.Module:
        precision = self.engine_config.mixed_precision or {}
        self._compute_dtype = PrecisionType.to_dtype(precision.get("param_dtype", "bf16"))
        if self._compute_dtype == torch.float16:
            raise ConfigError(
                "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp16 scales the policy's loss, and a "
                "speculator has no scaler of its own: take bf16"
            )
        self._base_as_loaded = module
        with torch.random.fork_rng(devices=[]):
            self._build_speculator(module, self._why_no_target_of_strategy())
            self._build_monitor()
        del self._base_as_loaded
        record_lm_head_input(module, self._seen)
        record_layers(module, self._needs.aux_hidden_state_layer_ids, self._seen)
        module = super()._build_fsdp_module(module)
        self._shard_speculator(self.device_mesh, PrecisionType.to_dtype(precision.get("reduce_dtype", "fp32")))
        return module

    def _build_monitor(self) -> None:
        following = self._following
        if following.shadow_frozen:
            if not isinstance(self.adapter.speculator, ChainSpeculator):
                raise ConfigError(
                    f"{KEY}.shadow_frozen=true follows rounds of a chain of heads (MLP, LSTM), and the speculator in "
                    f"{following.path!r} is none: leave it off"
                )
            frozen = ChainSpeculator.from_pretrained(following.path, dtype=self._compute_dtype)
            self._monitor = PairedMonitor(frozen.to(get_device_id()))
        if following.extra_steps:
            if self._learns_from_target:
                raise ConfigError(
                    f"{KEY}.extra_steps={following.extra_steps} learns from tokens, and soft targets are the policy's "
                    f"of that moment: take {KEY}.training.objective=ce"
                )
            self._kept = KeptSteps(following.replay_steps)

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        config = FSDPOptimizerConfig(
            lr=self._following.lr,
            weight_decay=self._following.weight_decay,
            override_optimizer_config=adam_arguments(),
        )
        self.speculator_optimizer = build_optimizer(self.adapter.get_optimizer_params(), config)
        self.speculator_scheduler = get_constant_schedule_with_warmup(
            self.speculator_optimizer, num_warmup_steps=self._following.lr_warmup_steps
        )
        return super()._build_optimizer(module)

    # A step

    def train_batch(self, data: TensorDict, loss_function: Callable) -> dict[str, Any]:
        step = self.speculator_scheduler.last_epoch
        is_wanted = self._adaptation is None or self._adaptation.learns(step)
        self._learns = step % self._following.every_n_steps == 0 and is_wanted
        self._observes = self._monitor is not None and not self._has_observed
        try:
            output = super().train_batch(data, loss_function)
            metrics = {**self._learning_metrics(data), **self._finish_observation()}
        finally:
            self._learns = self._observes = False
        output["metrics"].update({f"speculator/{name}": [value] for name, value in metrics.items()})
        return output

    def _learning_metrics(self, data: TensorDict) -> dict[str, float]:
        if not self._learns:
            return {}
        sums = self._sums.output(data, 1.0)["metrics"][SUMS_KEY]
        metrics = {
            **self.adapter.summarize_metrics(sums),
            "train_loss": sums["speculator_loss"],
            "grad_norm": self._speculator_grad_norm,
            "lr": self.speculator_optimizer.param_groups[0]["lr"],
        }
        if self._kept is not None:
            self._learn_from_kept(self._kept)
        return metrics

    def _finish_observation(self) -> dict[str, float]:
        if self._monitor is None or not self._observes:
            return {}
        self._has_observed = True
        found = self._monitor.finish(get_device_id())
        if self._adaptation is not None:
            self._adaptation.note(found)
        return {**found, "learns": float(self._learns)}

    def _learn_from_kept(self, kept: KeptSteps) -> None:
        """Steps of the speculator alone, after the one beside the policy."""
        seed = f"{self.engine_config.seed} {self.speculator_scheduler.last_epoch}"
        for step in kept.draw(self._following.extra_steps, seed, get_device_id()):
            self.speculator_optimizer.zero_grad()
            for number, packed in enumerate(step, start=1):
                self._gather_for(is_last=number == len(step))
                loss, _ = self._run_speculator(packed, forward_only=False)
                (loss * dist.get_world_size()).backward()
            cast(FSDPModule, self.speculator_unit).reshard()
            self._speculator_step()

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable, forward_only: bool = False
    ) -> dict[str, Any]:
        if not self._learns and not self._observes:
            return super().forward_backward_batch(data, loss_function, forward_only)
        data[MASK_KEY] = self._trained_tokens(data)
        self._begin_step(_rows(data))
        if self._learns and self._kept is not None:
            self._kept.begin_step()
        with self._target_gathered(forward_only=False) if self._learns else nullcontext():
            output = super().forward_backward_batch(data, loss_function, forward_only)
        cast(FSDPModule, self.speculator_unit).reshard()
        return output

    def _trained_tokens(self, data: TensorDict) -> Any:
        mask, limit = response_mask(data), self._following.max_tokens_per_step
        if limit is None:
            return mask
        seed = self.engine_config.seed + self.speculator_scheduler.last_epoch
        rank, size = self.get_data_parallel_rank(), self.get_data_parallel_size()
        return at_most(mask, limit * (rank + 1) // size - limit * rank // size, torch.Generator().manual_seed(seed))

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        if not self._learns and not self._observes:
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        with self._seen.recording():
            policy_loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        packed = self._pack(self._packed_states(micro_batch, {"pad_size": self._pad_size}), _rows(micro_batch))
        if self._observes:
            assert self._monitor is not None
            # Now, before it learns: what drafted these rollouts.
            cast(FSDPModule, self.speculator_unit).unshard()
            live = cast(ChainSpeculator, self.adapter.speculator)
            self._monitor.measure(live, share_of_sequences(packed, *self._rank_among_sharers()))
        if self._learns:
            if self._kept is not None:
                self._kept.keep(packed)
            loss, sums = self._run_speculator(packed, forward_only=False)
            # Now and apart: its graph is gone before the policy's backward pass, which goes as if it had never been.
            # FSDP averages gradients over all ranks, and each rank holds a different part of the global batch's loss.
            (loss * dist.get_world_size()).backward()
            self._sums.record(sums, loss, None)
        return policy_loss, output

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        self._pad_size = output_args.get("pad_size", 0)
        return model_inputs, output_args

    @contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> Iterator[None]:
        self._gather_for(is_last=is_last_micro_batch)
        with super()._gradient_sync_context(is_last_micro_batch=is_last_micro_batch):
            yield

    def optimizer_zero_grad(self) -> None:
        super().optimizer_zero_grad()
        self.speculator_optimizer.zero_grad()

    def optimizer_step(self) -> float:
        policy_norm = super().optimizer_step()
        if self._learns:
            self._speculator_step()
        return policy_norm

    def _speculator_step(self) -> None:
        clip_grad = self._following.clip_grad
        norm = full_norm(fsdp2_clip_grad_norm_(list(self.speculator_unit.parameters()), max_norm=clip_grad))
        self._speculator_grad_norm = norm.item()
        if torch.isfinite(norm):
            self.speculator_optimizer.step()
        else:
            print(f"WARN: the speculator's grad_norm is not finite: {norm}; its step is skipped")

    def lr_scheduler_step(self) -> float:
        self.speculator_scheduler.step()
        self._has_observed = False
        if self._kept is not None:
            self._kept.begin_trainer_step()
        return super().lr_scheduler_step()

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if optimizer and device == get_device_name():
            load_fsdp_optimizer(self.speculator_optimizer, device)
        elif optimizer:
            offload_fsdp_optimizer(self.speculator_optimizer)

    # What rollout gets

    def get_per_tensor_param(self, *args: Any, **kwargs: Any) -> tuple[Iterator[tuple[str, Tensor]], Any]:
        """verl's tensors, and after them the speculator's under the names of its files, in the type it is served in."""
        policy, peft_config = super().get_per_tensor_param(*args, **kwargs)
        return chain(policy, self._speculator_tensors()), peft_config

    @torch.no_grad()
    def _speculator_tensors(self) -> Iterator[tuple[str, Tensor]]:
        speculator = self.adapter.speculator
        dtype = getattr(torch, speculator.config.torch_dtype)
        for name, tensor in self.speculator_unit.state_dict().items():
            full = tensor.to(get_device_id())
            full = full.full_tensor() if isinstance(full, DTensor) else full
            full = full.to(dtype) if full.is_floating_point() else full
            for own, view in speculator.file_views({name.removeprefix(PREFIX): full}).items():
                yield f"{PREFIX}{own}", view.contiguous()

    def get_per_tensor_param_shard(self, **kwargs: Any) -> Any:
        raise ConfigError(
            "actor_rollout_ref.rollout.checkpoint_engine.backend=delta_sharded sends shards of the policy alone, and "
            "the speculator would stay behind: take another backend"
        )

    # Checkpoints: verl's files, and the speculator's in the layout of `verl_speculator.checkpoint.layout`

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Write both into `local_path`; every rank must call it."""
        FSDPEngineWithLMHead.save_checkpoint(self, local_path, hdfs_path, global_step, max_ckpt_to_keep, **kwargs)
        folder = Path(local_path)
        with self._speculator_on_device():
            save_speculator(folder, self.adapter.speculator, self.speculator_unit, PREFIX, pytorch_bin=False)
            save_training_state(folder, *self._training_state())
        if self._adaptation is not None and dist.get_rank() == 0:
            (folder / ADAPTATION_FILE).write_text(json.dumps(self._adaptation.state_dict()))
        dist.barrier()

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False, **kwargs: Any
    ) -> None:
        """Undo `save_checkpoint`; every rank must call it.

        Raises:
            CheckpointError: It holds no speculator, or is damaged.
        """
        folder = Path(local_path)
        if not (folder / RESUME_FOLDER).is_dir():
            raise CheckpointError(
                f"{folder} was written without a speculator: go on without one, or start another run from its weights"
            )
        FSDPEngineWithLMHead.load_checkpoint(self, local_path, hdfs_path, del_local_after_load, **kwargs)
        # verl has set the random states.
        with self._speculator_on_device(), torch.random.fork_rng():
            load_training_state(folder, *self._training_state())
        # A run that did not adapt has none.
        if self._adaptation is not None and (folder / ADAPTATION_FILE).is_file():
            self._adaptation.load_state_dict(json.loads((folder / ADAPTATION_FILE).read_text()))
        dist.barrier()

    def _training_state(self) -> tuple[nn.Module, torch.optim.Optimizer, Any, nn.Module | None]:
        return self.speculator_unit, self.speculator_optimizer, self.speculator_scheduler, None

    def _save_base(self, folder: Path) -> None:
        raise NotImplementedError("verl writes the policy")

    @contextmanager
    def _speculator_on_device(self) -> Iterator[None]:
        """What is offloaded is brought in, since ranks exchange what lies on their devices only."""
        if self._is_offload_param:
            self.speculator_unit.to(get_device_id())
        if self._is_offload_optimizer:
            load_fsdp_optimizer(self.speculator_optimizer, get_device_id())
        try:
            yield
        finally:
            if self._is_offload_param:
                self.speculator_unit.to("cpu")
            if self._is_offload_optimizer:
                offload_fsdp_optimizer(self.speculator_optimizer)


def _rows(data: TensorDict) -> TensorDict:
    """What the speculator's engine reads of a batch, with a mask as long as the sequences."""
    return TensorDict({"input_ids": data["input_ids"], "loss_mask": data[MASK_KEY]}, batch_size=data.batch_size)
