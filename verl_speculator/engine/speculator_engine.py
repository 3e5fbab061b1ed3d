"""What the FSDP and the Megatron engine share: the speculator beside the base model, and what it is given of a batch.

The speculator is an FSDP2 unit of its own, whatever wraps or cuts the base. So a frozen base has no part in the
backward pass at all, and optimizer and checkpoints do not depend on how the base is laid out.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.base import BaseEngine

from verl_speculator.adapters import AdapterNeeds, SpeculatorAdapter, build_speculator_adapter
from verl_speculator.adapters.finding import ADAPTER_KEY
from verl_speculator.checkpoint.hidden_states import StatesCacheSettings
from verl_speculator.checkpoint.layout import BASE_FOLDER
from verl_speculator.checkpoint.training_state import (
    load_training_state,
    save_speculator,
    save_training_state,
)
from verl_speculator.engine.base_export import base_dtype
from verl_speculator.engine.cached_states import CachedStates
from verl_speculator.engine.compilation import compile_speculator
from verl_speculator.engine.hidden_states import SeenStates, output_embeddings
from verl_speculator.engine.sequence_parallel import share_of_sequences, share_of_targets
from verl_speculator.engine.speculator_unit import SpeculatorUnit, build_speculator, shard, speculator_mesh
from verl_speculator.engine.step_sums import StepSums
from verl_speculator.engine.target_head import FrozenHead, why_not_plain, why_unknown
from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.losses import PackedHiddenStates, TargetHead
from verl_speculator.models.serialization import PREFIX
from verl_speculator.platforms import cpu


class SpeculatorEngine(BaseEngine):
    """Stands before a backend's engine among the base classes of ours.

    The backend's engine runs the base and yields hidden states; what becomes of them is here. `infer_batch` computes
    the same losses and metrics as training without it. A step's metrics are sums and counts over the whole global
    batch, the same on every rank.

    Attributes:
        adapter: The speculator's type, with the speculator that trains.
        speculator_unit: Its sharded module.
        cached_states: A frozen base's hidden states on disk, where the run keeps them; set by `initialize`.
    """

    model_config: Any
    engine_config: Any

    adapter: SpeculatorAdapter
    speculator_unit: SpeculatorUnit
    _needs: AdapterNeeds
    _compute_dtype: torch.dtype
    _seen: SeenStates
    _frozen_head: FrozenHead | None
    _why_no_target: str | None
    _why_not_plain: str | None
    _sums: StepSums
    _target: TargetHead | None = None
    cached_states: CachedStates | None = None
    _states_cache_settings: StatesCacheSettings | None = None
    # Whether all ranks run the speculator at once, so that its layers can be gathered one by one.
    _gathers_layers_apart = True
    # What errors call the setting that chose the adapter.
    _adapter_key = ADAPTER_KEY
    # As it was published; in joint training it may train in another one.
    _base_dtype: torch.dtype | None

    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None:
        if cpu.is_active():
            cpu.keep_freed_memory()
        super().__init__(model_config, *args, **kwargs)
        self._base_dtype = base_dtype(model_config.hf_config)

    @property
    def _options(self) -> Any:
        """What is set of the speculator: an object with the fields that `SpeculatorModelConfig` adds to verl's."""
        return self.model_config

    @property
    def is_base_frozen(self) -> bool:
        return self._options.freeze_base_model

    def use_states_cache(self, settings: StatesCacheSettings) -> None:
        """Keep the hidden states of the frozen base in a folder; to be called before `initialize`."""
        self._states_cache_settings = settings

    # What an engine tells

    @abstractmethod
    def _base_modules(self) -> list[nn.Module]:
        """The parts of the base on this rank."""

    @abstractmethod
    def _rank_among_sharers(self) -> tuple[int, int]:
        """This rank, and the number of ranks, of the group that holds the same batch and divides its loss."""

    @abstractmethod
    def _trained_head(self) -> TargetHead:
        """The head of a base that trains; every rank calls this."""

    @abstractmethod
    def _base_matrices(self, base: nn.Module) -> tuple[Tensor, Tensor]:
        """The base's embeddings and vocabulary matrix, [V, H] each, on rank 0; every rank calls this.

        Args:
            base: As in `_build_speculator`.
        """

    @abstractmethod
    def _training_state(self) -> tuple[nn.Module, torch.optim.Optimizer, Any, nn.Module | None]:
        """What trains, its optimizer and its scheduler; and the base where these include it."""

    @abstractmethod
    def _save_base(self, folder: Path) -> None:
        """Write a base that trains into a checkpoint's folder; every rank calls this."""

    def _load_base(self, folder: Path) -> None:
        """Read what `_save_base` wrote and `_training_state` does not hold; every rank calls this."""

    # Building

    def _make_adapter(self) -> SpeculatorAdapter:
        return build_speculator_adapter(self.model_config.speculator_adapter, self.model_config.speculator)

    def _build_speculator(self, base: nn.Module, why_no_target: str | None = None) -> None:
        """Make adapter and speculator, and settle what the engine has to provide.

        Args:
            base: The Hugging Face model, as it was loaded or without storage.
            why_no_target: Why this engine cannot tell its distribution; None if it can.

        Raises:
            ConfigError: the adapter needs what this base cannot give.
        """
        config, options = self.model_config, self._options
        self.adapter = self._make_adapter()
        self.adapter.speculator = build_speculator(self.adapter, base, options.speculator_path, self.engine_config.seed)
        if options.speculator_path is None and self.adapter.starts_from_base:
            matrices = self._base_matrices(base)
            if torch.distributed.get_rank() == 0:
                generator = torch.Generator().manual_seed(self.engine_config.seed)
                self.adapter.start_from_base(*matrices, generator)
        if options.compile:
            compile_speculator(self.adapter.speculator)
        self.speculator_unit = SpeculatorUnit(self.adapter)
        self._needs = self.adapter.needs
        self._seen = SeenStates()
        self._frozen_head = None
        head = output_embeddings(base)
        self._why_no_target = why_no_target or why_unknown(config.hf_config, head)
        self._why_not_plain = self._why_no_target or why_not_plain(config.hf_config, head)

        name = f"{self._adapter_key}: a {type(self.adapter).__name__}"
        why = self._why_not_plain if self._needs.target_head_weight else self._why_no_target
        if why and (self._needs.target_head_weight or self._needs.target_head):
            raise ConfigError(
                f"{name} learns from the base model's own distribution, which is not known for this base because "
                f"{why}: choose another adapter or base"
            )
        num_layers = config.hf_config.get_text_config().num_hidden_layers
        beyond = [layer_id for layer_id in self._needs.aux_hidden_state_layer_ids if not 0 <= layer_id <= num_layers]
        if beyond:
            raise ConfigError(
                f"{name} asks for the states after layer {beyond[0]}, and the base model has {num_layers} layers: "
                f"give ids from 0 to {num_layers}"
            )

        if self._states_cache_settings is not None:
            rank, size = self._rank_among_sharers()
            num_writers = torch.distributed.get_world_size() // size
            self.cached_states = CachedStates(
                self._states_cache_settings, self._state_keys(), config.hf_config, num_writers if rank == 0 else 0
            )

    @property
    def _needs_frozen_head(self) -> bool:
        wanted = self._learns_from_target or self._options.measure_sampled_acceptance
        return self.is_base_frozen and wanted and self._why_no_target is None

    @property
    def _learns_from_target(self) -> bool:
        return self._needs.target_head_weight or self._needs.target_head

    def _shard_speculator(self, mesh: Any, reduce_dtype: torch.dtype) -> None:
        mesh = speculator_mesh(self._options.speculator_shard_size, mesh)
        layers = getattr(self.adapter.speculator, "layers", []) if self._gathers_layers_apart else []
        shard(self.speculator_unit, mesh, MixedPrecisionPolicy(self._compute_dtype, reduce_dtype), layers)
        if self._frozen_head is not None:
            shard(self._frozen_head, mesh, MixedPrecisionPolicy())

    # Modes and devices

    @contextmanager
    def train_mode(self, **kwargs: Any) -> Iterator[None]:
        with super().train_mode(**kwargs):
            self._set_train_mode(True)
            yield

    @contextmanager
    def eval_mode(self, **kwargs: Any) -> Iterator[None]:
        with super().eval_mode(**kwargs):
            self._set_train_mode(False)
            yield

    def _set_train_mode(self, training: bool) -> None:
        # A frozen base must not drop out: its hidden states are the data that the speculator learns from.
        for module in self._base_modules():
            module.train(training and not self.is_base_frozen)
        self.speculator_unit.train(training)

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        # Megatron's engine moves its model while it builds, when there is no speculator yet.
        if model and hasattr(self, "speculator_unit"):
            target = get_device_id() if device == get_device_name() else device
            self.speculator_unit.to(target)
            if self._frozen_head is not None:
                self._frozen_head.to(target)

    # A step

    def _begin_step(self, data: TensorDict) -> None:
        self._sums = StepSums(self.adapter, data, self.get_data_parallel_group())
        if self.cached_states is not None:
            self.cached_states.begin_step(data)

    @contextmanager
    def _target_gathered(self, forward_only: bool) -> Iterator[None]:
        """Have the base's vocabulary matrix at hand where it is asked for, in full and gathered once."""
        wanted = self._learns_from_target or (forward_only and self._options.measure_sampled_acceptance)
        if not wanted or self._why_no_target is not None:
            yield
            return
        try:
            if self._frozen_head is not None:
                with self._frozen_head.gathered() as self._target:
                    yield
            else:
                self._target = self._trained_head()
                yield
        finally:
            self._target = None

    @property
    def _plain_target_weight(self) -> Tensor | None:
        return None if self._target is None or self._why_not_plain else self._target.weight

    def _state_keys(self) -> list[int]:
        """What a forward pass records: the last states first, then those that the adapter asked for."""
        return [SeenStates.LAST, *self._needs.aux_hidden_state_layer_ids]

    def _pack(self, states: list[Tensor], micro_batch: TensorDict) -> PackedHiddenStates:
        """What adapters see of a micro-batch.

        Args:
            states: For each of `_state_keys`, [T, H].
        """
        if self.is_base_frozen or self._options.detach_hidden_states:
            states = [tensor.detach() for tensor in states]
        last, *aux = (tensor.to(self._compute_dtype) for tensor in states)
        input_ids, cu_seqlens = micro_batch["input_ids"].values(), micro_batch["input_ids"].offsets()
        return PackedHiddenStates(
            hidden_states=last,
            input_ids=input_ids,
            loss_mask=micro_batch["loss_mask"].values(),
            cu_seqlens=cu_seqlens,
            lm_head_weight=self._plain_target_weight,
            target_head=self._target,
            head_counts=self._sums.head_counts,
            aux_hidden_states=torch.cat(aux, dim=1) if aux else None,
            position_ids=_position_ids(input_ids, cu_seqlens) if self._needs.position_ids else None,
        )

    def _run_speculator(self, packed: PackedHiddenStates, forward_only: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of a micro-batch's loss and sums; in validation also of what decoding would accept."""
        rank, size = self._rank_among_sharers()
        by_targets = dataclasses.replace(packed, loss_mask=share_of_targets(packed.loss_mask, rank, size))
        if not forward_only and not self._needs.whole_sequences:
            return self.speculator_unit(by_targets)
        # Acceptance follows the rounds of decoding from token to token, so it too needs sequences uncut.
        by_sequences = share_of_sequences(packed, rank, size)
        trained = by_sequences if self._needs.whole_sequences else by_targets
        return self.speculator_unit(trained, by_sequences) if forward_only else self.speculator_unit(trained)

    def _gather_for(self, *, is_last: bool) -> None:
        """Say before a micro-batch whether it is the step's last one.

        Unless `model.gather_speculator_once` is off, the unit stays gathered until then, and its gradients are added up
        on each rank and reduced once.
        """
        unit = cast(FSDPModule, self.speculator_unit)
        release = is_last or not self._options.gather_speculator_once
        unit.set_reshard_after_backward(release)
        unit.set_requires_gradient_sync(release)

    # Checkpoints: only what trains, in the layout of `verl_speculator.checkpoint.layout`

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Write this step's files into `local_path`; every rank must call it."""
        folder = Path(local_path)
        pytorch_bin = self._options.save_pytorch_model_bin
        save_speculator(folder, self.adapter.speculator, self.speculator_unit, PREFIX, pytorch_bin=pytorch_bin)
        save_training_state(folder, *self._training_state())
        if not self.is_base_frozen:
            self._save_base(folder)
        torch.distributed.barrier()

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False, **kwargs: Any
    ) -> None:
        """Undo `save_checkpoint`; every rank must call it.

        Raises:
            CheckpointError: it is damaged, or was written with a base that trained where this one is frozen or the
                other way round.
        """
        folder = Path(local_path)
        if self.is_base_frozen and (folder / BASE_FOLDER).is_dir():
            raise CheckpointError(
                f"{folder} was written with model.freeze_base_model=false, and its speculator follows the base that "
                f"trained with it: go on with that, or freeze the trained base with model.path={folder / BASE_FOLDER} "
                f"model.speculator_path={folder} and another trainer.default_local_dir"
            )
        load_training_state(folder, *self._training_state())
        if not self.is_base_frozen:
            self._load_base(folder)
        torch.distributed.barrier()


def _position_ids(input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T], counted from 0 in each sequence, whatever position ids a base of several modalities has."""
    starts_T = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=input_ids.shape[0])
    return torch.arange(input_ids.shape[0], device=input_ids.device) - starts_T.to(input_ids.device)


def full_norm(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
