"""The base model and its tokenizer, loaded for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from verl_speculator.errors import ConfigError
from verl_speculator.evaluation.settings import EvaluationInput, EvaluationSettings
from verl_speculator.evaluation.speculator_files import check_fits
from verl_speculator.models import SpeculatorConfig


@dataclass(frozen=True)
class Target:
    """`model` is in eval mode on `device`; `stop_tokens` end an answer."""

    model: Any
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def pad_token(self) -> int:
        """What fills a batch on the left; it is masked out, so any token of the vocabulary does."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0


def pick_device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch answers an unknown name and an absent accelerator with different types.
        raise ConfigError(
            f"--device={name} cannot be used here ({str(error).partition(chr(10))[0]}); use --device cpu"
        ) from error
    if device.type == "meta":
        raise ConfigError("--device=meta has no data to decode with; use --device cpu")
    return device


def load_tokenizer(given: EvaluationInput) -> Any:
    """:raises ConfigError: transformers cannot read one for the base"""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(given.base)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--base: no tokenizer can be read from {given.base!r} ({_first_line(error)})") from error
    if given.chat_template is not None:
        tokenizer.chat_template = given.chat_template.read_text(encoding="utf-8")
    return tokenizer


def load_config(given: EvaluationInput) -> Any:
    """The text model's part of the base's configuration.

    :raises ConfigError: there is no such model
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(given.base)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--base: no model can be read from {given.base!r} ({_first_line(error)})") from error
    return config.get_text_config()


def check_sizes(config: Any, tokenizer: Any, speculators: Sequence[tuple[Path, SpeculatorConfig]], base: str) -> None:
    """Raise `ConfigError` if base, tokenizer and speculators do not belong together."""
    for path, speculator in speculators:
        check_fits(speculator, config.hidden_size, config.vocab_size, path)
    # Rows beyond the tokenizer's tokens are padding; tokens beyond the rows cannot be fed to the model.
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"--base: the tokenizer in {base!r} has {len(tokenizer)} tokens and the model's vocabulary only "
            f"{config.vocab_size}: the two do not belong together"
        )


def load_target(given: EvaluationInput, settings: EvaluationSettings, tokenizer: Any, device: torch.device) -> Target:
    """:raises ConfigError: the weights cannot be read"""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = "float32" if settings.dtype == "auto" and device.type == "cpu" else settings.dtype
    dtype = name if name == "auto" else getattr(torch, name)
    try:
        model = AutoModelForCausalLM.from_pretrained(given.base, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--base: {given.base!r} cannot be loaded ({_first_line(error)})") from error
    model = model.to(device).eval()
    rows = model.get_output_embeddings().weight.shape[0]
    if rows != model.config.get_text_config().vocab_size:
        raise ConfigError(f"--base: lm_head of {given.base!r} has {rows} rows, which is not its config's vocab_size")
    return Target(model, tokenizer, _stop_tokens(model, tokenizer), device, model.dtype)


def _stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    named = getattr(model.generation_config, "eos_token_id", None)
    tokens = named if isinstance(named, list) else [named]
    return tuple(sorted({token for token in (*tokens, tokenizer.eos_token_id) if token is not None}))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
