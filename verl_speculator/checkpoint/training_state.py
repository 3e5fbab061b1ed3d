"""What a training run needs to go on as if it had not stopped: weights, optimizer, scheduler and random states.

Nothing of it is pickled: a checkpoint may come from a stranger. Weights are here in the type that they are trained in;
those in `speculator/` are for serving.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from verl_speculator.checkpoint.layout import RESUME_FOLDER
from verl_speculator.checkpoint.sharded import load_sharded, save_sharded
from verl_speculator.errors import CheckpointError
from verl_speculator.models import Speculator
from verl_speculator.models.serialization import SUBFOLDER

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_TENSORS_FOLDER = "tensors"
_VALUES_FILE = "values.json"
_RANDOM_KEY = "random"


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A sharded module's tensors, gathered on rank 0; empty on the others. Every rank must call this."""
    return cast(dict[str, Tensor], get_model_state_dict(module, options=_FULL))


def save_speculator(
    folder: Path, speculator: Speculator, unit: nn.Module, prefix: str, *, pytorch_bin: bool = True
) -> None:
    """Write `speculator/` in the type that its configuration names for serving; every rank must call this.

    Args:
        unit: The sharded module that holds the speculator under the name `prefix`.
        pytorch_bin: Also write `pytorch_model.bin`.
    """
    full = full_state_dict(unit)
    if dist.get_rank() == 0:
        own = {name.removeprefix(prefix): tensor for name, tensor in full.items()}
        dtype = getattr(torch, speculator.config.torch_dtype)
        speculator.save_pretrained(folder / SUBFOLDER, state_dict=own, dtype=dtype, pytorch_bin=pytorch_bin)


def save_training_state(
    folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, base: nn.Module | None
) -> None:
    """Write `resume/`; every rank must call this.

    Args:
        trained: The module that holds every trained parameter.
        base: The base model, a child of `trained`, if it trains too.
    """
    resume = folder / RESUME_FOLDER
    resume.mkdir(exist_ok=True)
    dist.barrier()
    optimizer_state = get_optimizer_state_dict(trained, optimizer)
    moments, others = _split(optimizer_state)
    save_sharded(resume / _TENSORS_FOLDER, {**_weights(_model_states(trained, base)), **moments})
    _save_random_state(_random_file(resume))
    if dist.get_rank() == 0:
        values = {
            "optimizer": {"state": others, "param_groups": optimizer_state["param_groups"]},
            "scheduler": scheduler.state_dict(),
            "world_size": dist.get_world_size(),
            "has_base": base is not None,
        }
        (resume / _VALUES_FILE).write_text(json.dumps(values, default=Tensor.tolist))


def load_training_state(
    folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, base: nn.Module | None
) -> None:
    """Undo `save_training_state`, on the same or another number of processes; every rank must call this.

    Raises:
        CheckpointError: The checkpoint is damaged, or of a run that trained something else.
    """
    resume = folder / RESUME_FOLDER
    try:
        saved = json.loads((resume / _VALUES_FILE).read_text())
        if base is not None and not saved["has_base"]:
            raise CheckpointError(
                f"{folder} was written with model.freeze_base_model=true and has no base model to go on training"
            )
        model_states = _model_states(trained, base)
        optimizer_state = get_optimizer_state_dict(trained, optimizer)
        moments, _ = _split(optimizer_state)
        # In place: these are this rank's own parts of the parameters and moments, whatever the ranks that wrote them.
        load_sharded(resume / _TENSORS_FOLDER, {**_weights(model_states), **moments})
        _set_others(optimizer_state, saved["optimizer"])
        for module, state in model_states:
            set_model_state_dict(module, state)
        set_optimizer_state_dict(trained, optimizer, optimizer_state)
        scheduler.load_state_dict(saved["scheduler"])
        # With another number of processes there is no one-to-one match; a run without dropout draws nothing anyway.
        if saved["world_size"] == dist.get_world_size():
            _load_random_state(_random_file(resume))
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{resume} cannot be read, it is damaged or incomplete: {error}") from error


def _model_states(trained: nn.Module, base: nn.Module | None) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Each part that trains and its parameters, sharded as they are."""
    # A base is wrapped in a way of its own, and torch gives the state of one way at a time.
    parts = [trained] if base is None else list(trained.children())
    return [(part, get_model_state_dict(part)) for part in parts]


def _weights(model_states: list[tuple[nn.Module, dict[str, Any]]]) -> dict[str, Tensor]:
    return {
        f"weights.{i}.{name}": value
        for i, (_, state) in enumerate(model_states)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _split(optimizer_state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """An optimizer's state as tensors by name, and what of it is no tensor, by parameter."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for parameter, values in optimizer_state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{parameter}.{name}"] = value
            else:
                others.setdefault(parameter, {})[name] = value
    return tensors, others


def _set_others(optimizer_state: dict[str, Any], saved: dict[str, Any]) -> None:
    for parameter, values in saved["state"].items():
        optimizer_state["state"][parameter].update(values)
    for group, before in zip(optimizer_state["param_groups"], saved["param_groups"], strict=True):
        if sorted(group["params"]) != sorted(before["params"]):
            raise CheckpointError("the optimizer had other parameters")
        for key in group.keys() & before.keys() - {"params"}:
            # JSON has neither tuples nor tensors.
            if isinstance(group[key], Tensor):
                group[key].fill_(before[key])
            else:
                group[key] = tuple(before[key]) if isinstance(group[key], tuple) else before[key]


def _random_file(resume: Path) -> Path:
    return resume / f"random_rank_{dist.get_rank()}.safetensors"


def _save_random_state(file: Path) -> None:
    version, python, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(tuple, np.random.get_state())
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    others = {"python": [version, gauss], "numpy": [name, position, has_gauss, cached]}
    save_file(tensors, file, metadata={"format": "pt", _RANDOM_KEY: json.dumps(others)})


def _load_random_state(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
        others = json.loads(opened.metadata()[_RANDOM_KEY])
    torch.set_rng_state(state["torch"])
    version, gauss = others["python"]
    random.setstate((version, tuple(state["python"].tolist()), gauss))
    name, position, has_gauss, cached = others["numpy"]
    np.random.set_state((name, state["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
