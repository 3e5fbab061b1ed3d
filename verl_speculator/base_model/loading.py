"""The base model and its tokenizer, loaded for decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from verl_speculator.base_model.settings import LoadSettings, read_quantization
from verl_speculator.errors import ConfigError

# What a base's weights may take of one accelerator's free memory: the cache, the activations and the speculator come
# on top.
_SHARE_OF_WEIGHTS = 0.8


@dataclass(frozen=True)
class Target:
    """`model` is in eval mode and takes its input on `device`; `stop_tokens` end an answer."""

    model: Any
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype


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


def load_tokenizer_and_config(base: str, settings: LoadSettings, chat_template: Path | None = None) -> tuple[Any, Any]:
    """The tokenizer, with `chat_template` in place of its own, and the text model's part of the configuration.

    Raises:
        ConfigError: One of them cannot be read, there is no chat template, or the two do not belong together.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _explain(base, "no tokenizer can be read from"):
        tokenizer = AutoTokenizer.from_pretrained(base, **_source(settings))
    with _explain(base, "no model can be read from"):
        config = AutoConfig.from_pretrained(base, **_source(settings)).get_text_config()
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise ConfigError(
            "--base: its tokenizer has no chat template; use an instruction-tuned model or give one with "
            "--chat-template FILE"
        )
    # Rows beyond the tokenizer's tokens are padding; tokens beyond the rows cannot be fed to the model.
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"--base: the tokenizer in {base!r} has {len(tokenizer)} tokens and the model's vocabulary only "
            f"{config.vocab_size}: the two do not belong together"
        )
    return tokenizer, config


def load_target(base: str, settings: LoadSettings, tokenizer: Any) -> Target:
    """The model's weights, on one device or spread over several.

    Raises:
        ConfigError: They cannot be read, or the accelerators together have too little memory for them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = pick_device(settings.device)
    name = "float32" if settings.dtype == "auto" and device.type == "cpu" else settings.dtype
    dtype = name if name == "auto" else getattr(torch, name)
    device_map: str | dict[str, torch.device] | None = settings.device_map
    if settings.quantization is not None:
        refuse_quantization_on(device, "--quantization")
    if device_map is None and settings.device == "auto" and _is_too_large_for_one(base, settings, dtype):
        device_map = "auto"
    if settings.quantization is not None and device_map is None:
        device_map = {"": device}  # quantised weights are made where they stay
    with _explain(base, "cannot load"):
        model = AutoModelForCausalLM.from_pretrained(
            base,
            quantization_config=read_quantization(settings.quantization),
            dtype=dtype,
            device_map=device_map,
            attn_implementation=settings.attn_implementation,
            **_source(settings),
        )
    if device_map is None:
        model = model.to(device)
    elif any(parameter.is_meta for parameter in model.parameters()):
        # accelerate would bring these layers in from main memory or the disk for every token.
        raise ConfigError(
            f"--base: {base!r} does not fit on the devices of this machine together; use --dtype bfloat16, or more of "
            "them"
        )
    rows = model.get_output_embeddings().weight.shape[0]
    if rows != model.config.get_text_config().vocab_size:
        raise ConfigError(f"--base: lm_head of {base!r} has {rows} rows, which is not its config's vocab_size")
    return Target(model.eval(), tokenizer, stop_tokens(model, tokenizer), model.device, model.dtype)


def refuse_quantization_on(device: torch.device, key: str) -> None:
    """Raises ConfigError for a CPU."""
    if device.type == "cpu":
        raise ConfigError(f"{key} is for accelerators: on a CPU leave it out, and load the weights as they are")


def stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: all that the model's generation config names, and the tokenizer's own."""
    return _stop_tokens(model.generation_config, tokenizer)


def read_stop_tokens(base: str, settings: LoadSettings, tokenizer: Any) -> tuple[int, ...]:
    """`stop_tokens` of a model that is not loaded."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(base, revision=settings.revision or "main")
    except OSError:
        # An older model has them among its sizes.
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base, **_source(settings)))
    return _stop_tokens(config, tokenizer)


def _stop_tokens(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    named = getattr(generation_config, "eos_token_id", None)
    tokens = named if isinstance(named, list) else [named]
    return tuple(sorted({token for token in (*tokens, tokenizer.eos_token_id) if token is not None}))


@contextmanager
def explain_out_of_memory(doing: str, advice: str) -> Iterator[None]:
    """Turn running out of memory inside it into a `ConfigError` of one sentence; `advice` says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch has a type for it on accelerators and only a message on a CPU.
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
            words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory")
        ):
            raise ConfigError(f"out of memory while {doing}: {advice}") from error
        raise


def _is_too_large_for_one(base: str, settings: LoadSettings, dtype: torch.dtype | str) -> bool:
    """Whether there are several accelerators, and the weights leave too little room on the first."""
    if torch.accelerator.device_count() < 2:
        return False
    from transformers import AutoConfig, AutoModelForCausalLM

    with _explain(base, "cannot load"):
        config = AutoConfig.from_pretrained(base, **_source(settings))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    bytes_each = (dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32).itemsize
    needed = bytes_each * sum(parameter.numel() for parameter in model.parameters())
    return needed > _SHARE_OF_WEIGHTS * _free_memory()


def _free_memory() -> int:
    """Bytes that are free on the current accelerator."""
    return torch.get_device_module().mem_get_info()[0]


def _source(settings: LoadSettings) -> dict[str, Any]:
    return {"revision": settings.revision or "main", "trust_remote_code": settings.trust_remote_code}


@contextmanager
def _explain(base: str, what: str) -> Iterator[None]:
    """What transformers says about a base that it cannot read, in one sentence."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise ConfigError(
                f"--base: {base!r} comes with Python code of its own: read it, then give --trust-remote-code"
            ) from error
        raise ConfigError(f"--base: {what} {base!r} ({text.partition(chr(10))[0] or type(error).__name__})") from error
