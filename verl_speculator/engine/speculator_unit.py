"""The speculator as one FSDP2 unit: gathered for its own forward and backward, sharded at all other times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from verl.utils.device import get_device_name
from verl.utils.fsdp_utils import fsdp2_load_full_state_dict

from verl_speculator.adapters import SpeculatorAdapter
from verl_speculator.adapters.settings import base_model_sizes
from verl_speculator.losses import PackedHiddenStates
from verl_speculator.models import Speculator


class SpeculatorUnit(nn.Module):
    """Holds the speculator; its forward is the adapter's work on it, so that FSDP gathers the weights around it."""

    def __init__(self, adapter: SpeculatorAdapter) -> None:
        super().__init__()
        self.speculator = adapter.speculator
        self._adapter = adapter

    def forward(
        self, packed: PackedHiddenStates, measured: PackedHiddenStates | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its sums, and in validation those of the acceptance on the sequences of `measured`."""
        loss, sums = self._adapter.compute_speculator_loss(packed)
        return loss, sums if measured is None else {**sums, **self._adapter.measure_acceptance(measured)}


def build_speculator(adapter: SpeculatorAdapter, base: nn.Module, path: str | None, seed: int) -> Speculator:
    """The speculator in float32, with weights on rank 0 and without storage on the others.

    It starts from the one at `path`, or afresh from `seed` whatever the number of processes.

    Raises:
        ConfigError: the one at `path` was trained for another hidden size or vocabulary.
    """
    if path:
        speculator = adapter.speculator_class.from_pretrained(path)
        sizes = base_model_sizes(base)
        speculator.config.check_fits_base(
            sizes["input_hidden_dim"], sizes["vocab_size"], f"model.speculator_path: the speculator in {path!r}"
        )
        return speculator.float() if dist.get_rank() == 0 else speculator.float().to("meta")
    if dist.get_rank() != 0:
        with torch.device("meta"):
            return adapter.build_speculator_module(base).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        speculator = adapter.build_speculator_module(base).float()
    if "torch_dtype" not in adapter.settings and get_device_name() == "cpu":
        # The type of its checkpoints' `speculator/`: bfloat16 is for the machines that it is fast on.
        speculator.config.torch_dtype = "float32"
    return speculator


def speculator_mesh(shard_size: int | None, default: DeviceMesh) -> DeviceMesh:
    """Over which processes a speculator is cut: `shard_size` neighbours, and all groups of these hold the same.

    Args:
        shard_size: `model.speculator_shard_size`; None takes the default.
        default: The mesh of the base, or of all processes.
    """
    world_size = dist.get_world_size()
    if shard_size is None:
        return default
    if shard_size == world_size:
        return init_device_mesh(get_device_name(), (world_size,), mesh_dim_names=("shard",))
    shape = (world_size // shard_size, shard_size)
    return init_device_mesh(get_device_name(), shape, mesh_dim_names=("replicate", "shard"))


def shard(unit: nn.Module, mesh: Any, policy: MixedPrecisionPolicy, layers: Iterable[nn.Module] = ()) -> None:
    """Shard in place and hand every rank its part of rank 0's weights.

    The weights are not dropped between forward and backward: one follows the other at once. Those of its `layers` are,
    and each of these is gathered by itself.
    """
    full = unit.state_dict()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fsdp2_load_full_state_dict(unit, full, mesh, None)
