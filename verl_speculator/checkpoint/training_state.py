"""What a training run needs to go on as if it had not stopped: optimizer, scheduler and random states.

Sharded state goes through ``torch.distributed.checkpoint``, which can load it on another number of processes.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from verl_speculator.checkpoint.layout import RESUME_FOLDER
from verl_speculator.errors import CheckpointError
from verl_speculator.models import Speculator
from verl_speculator.models.serialization import SUBFOLDER

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_OPTIMIZER_FOLDER = "optimizer"
_BASE_FOLDER = "base"
_SCHEDULER_FILE = "scheduler.pt"


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A sharded module's tensors, gathered on rank 0; empty on the others. Every rank must call this."""
    return cast(dict[str, Tensor], get_model_state_dict(module, options=_WHOLE))


def save_speculator(folder: Path, speculator: Speculator, unit: nn.Module, prefix: str) -> None:
    """Write ``speculator/``. ``unit`` is the sharded module that holds the speculator under the name ``prefix``."""
    whole = whole_state_dict(unit)
    if dist.get_rank() == 0:
        own = {name.removeprefix(prefix): tensor for name, tensor in whole.items()}
        speculator.save_pretrained(folder / SUBFOLDER, state_dict=own)


def load_speculator(folder: Path, unit: nn.Module, prefix: str) -> None:
    """Load ``speculator/`` into the sharded module; rank 0 reads and broadcasts."""
    whole: dict[str, Tensor] = {}
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            loaded = Speculator.from_pretrained(folder)
            whole = {prefix + name: tensor for name, tensor in loaded.state_dict().items()}
        except (CheckpointError, FileNotFoundError) as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise CheckpointError(failure[0])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(unit, cast(dict[str, Any], whole), options=options)


def save_training_state(
    folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, base: nn.Module | None
) -> None:
    """Write ``resume/``; every rank must call this.

    :param trained: the module that holds every trained parameter
    :param base: the base model if it trains too
    """
    resume = folder / RESUME_FOLDER
    resume.mkdir(exist_ok=True)
    dist.barrier()
    dcp.save(get_optimizer_state_dict(trained, optimizer), checkpoint_id=resume / _OPTIMIZER_FOLDER)
    if base is not None:
        dcp.save(get_model_state_dict(base), checkpoint_id=resume / _BASE_FOLDER)
    torch.save(_random_state(), resume / f"random_rank_{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        torch.save({"scheduler": scheduler.state_dict(), "world_size": dist.get_world_size()}, resume / _SCHEDULER_FILE)


def load_training_state(
    folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, base: nn.Module | None
) -> None:
    """Undo :func:`save_training_state`, on the same or another number of processes."""
    resume = folder / RESUME_FOLDER
    if base is not None and not (resume / _BASE_FOLDER).is_dir():
        raise CheckpointError(
            f"{folder} was written with model.freeze_base_model=true and has no base model to go on training"
        )
    try:
        _load_optimizer(resume / _OPTIMIZER_FOLDER, trained, optimizer)
        if base is not None:
            state = get_model_state_dict(base)
            dcp.load(state, checkpoint_id=resume / _BASE_FOLDER)
            set_model_state_dict(base, state)
        saved = torch.load(resume / _SCHEDULER_FILE, weights_only=True)
    except (dcp.api.CheckpointException, OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{resume} cannot be read, it is damaged or incomplete: {error}") from error
    scheduler.load_state_dict(saved["scheduler"])
    # With another number of processes there is no one-to-one match; a run without dropout draws nothing anyway.
    if saved["world_size"] == dist.get_world_size():
        _set_random_state(torch.load(resume / f"random_rank_{dist.get_rank()}.pt", weights_only=True))


def _load_optimizer(path: Path, trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = get_optimizer_state_dict(trained, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_optimizer_state_dict(trained, optimizer, state)


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = cast(tuple, np.random.get_state())
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
