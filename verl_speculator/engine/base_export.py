"""Writing a jointly trained base model as a Hugging Face folder, with the type and settings that it came with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from verl.utils.model import get_hf_auto_model_class

from verl_speculator.checkpoint.layout import BASE_FOLDER
from verl_speculator.checkpoint.training_state import full_state_dict


def base_dtype(hf_config: Any) -> torch.dtype | None:
    """The type that a base's configuration names. Ask before the model is loaded, which writes its own type there."""
    dtype = hf_config.dtype or hf_config.get_text_config().dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def save_base_model(folder: Path, module: nn.Module, model_config: Any, dtype: torch.dtype | None) -> None:
    """Gather the base model on rank 0 and write it to `huggingface/`; every rank must call this.

    Args:
        folder: Of the checkpoint.
        module: The base, sharded or not, of any class that verl loads, those of several modalities too.
        model_config: verl's section of the configuration, which knows where the base came from.
        dtype: Of the weights; None for the type in which they train.
    """
    full = full_state_dict(module)
    if dist.get_rank() != 0:
        return
    auto_class: Any = get_hf_auto_model_class(model_config.hf_config)
    with torch.device("meta"):
        plain = auto_class.from_config(
            module.config,
            trust_remote_code=model_config.trust_remote_code,
            dtype=dtype or next(tensor.dtype for tensor in full.values() if tensor.is_floating_point()),
        )
    # Tied tensors come out of a sharded model as two, and would be written as two.
    names = {id(tensor): name for name, tensor in reversed(plain.state_dict(keep_vars=True).items())}
    weights = {name: _cast(full[name], dtype) for name in names.values()}
    # A model writes its generation settings strictly, and some published ones do not pass.
    plain.generation_config = type(plain.generation_config)()
    plain.save_pretrained(folder / BASE_FOLDER, state_dict=weights)
    save_surroundings(folder / BASE_FOLDER, model_config)


def save_surroundings(folder: Path, model_config: Any) -> None:
    """Write what a base needs beside its weights: the tokenizer, and how it generates, with all its stop tokens."""
    processor = model_config.get_processor()
    if processor is not None:
        processor.save_pretrained(folder)
    if model_config.generation_config is not None:
        model_config.generation_config.to_json_file(folder / "generation_config.json")


def cast_weights(folder: Path, dtype: torch.dtype | None) -> None:
    """Rewrite the safetensors files of a folder in another type, one after the other."""
    for file in sorted(folder.glob("*.safetensors")):
        weights = {name: _cast(tensor, dtype) for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
