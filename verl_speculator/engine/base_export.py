"""Writing a jointly trained base model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from verl_speculator.checkpoint.layout import BASE_FOLDER
from verl_speculator.checkpoint.training_state import full_state_dict


def save_base_model(folder: Path, module: nn.Module, model_config: Any) -> None:
    """Gather the base model on rank 0 and write it, with its tokenizer, to `huggingface/`."""
    full = full_state_dict(module)
    if dist.get_rank() != 0:
        return
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(
            module.config, trust_remote_code=model_config.trust_remote_code, dtype=next(iter(full.values())).dtype
        )
    plain.save_pretrained(folder / BASE_FOLDER, state_dict=full)
    processor = model_config.get_processor()
    if processor is not None:
        processor.save_pretrained(folder / BASE_FOLDER)
