"""`model.compile`: torch.compile on the parts of a step that are many small operations. Checked on torch 2.13."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from verl_speculator.engine.hidden_states import decoder_layers
from verl_speculator.models import ChainSpeculator, Speculator

# Of one function: a chain's step is another graph for every head, in training and in validation.
_RECOMPILE_LIMIT = 64


def compile_base(model: Any) -> None:
    """Compile each decoder layer of a Hugging Face model that is not yet wrapped by FSDP.

    All layers run the same graphs. Hooks on them, FSDP's among these, stay outside, and so does the attention on packed
    sequences, whose number changes from batch to batch.

    Raises:
        ConfigError: the layers were not found.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    for layer in decoder_layers(model, "model.compile=true compiles them one by one"):
        _compile(layer, "forward")


def compile_speculator(speculator: Speculator) -> None:
    """Compile the step of a chain of heads; what is no chain stays as it is."""
    if isinstance(speculator, ChainSpeculator):
        _compile(speculator, "step")


def _compile(module: nn.Module, name: str) -> None:
    # The method and not the module: its class and the names of its weights stay the same.
    setattr(module, name, torch.compile(getattr(module, name), dynamic=True))
