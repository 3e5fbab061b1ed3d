"""A GGUF file, the form of llama.cpp and its relatives, turned into the Hugging Face folder that verl and vLLM want."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl_speculator.errors import ConfigError, MissingFileError

# A GGUF header names its special tokens under these keys (ggml's specification of the format); an end of turn that is
# not the end of text stands apart.
_SPECIAL = "tokenizer.ggml.{}_token_id"
_ENDS = ("eos", "eot", "eom")


def convert_gguf(file: Path, folder: Path, dtype: str = "float32") -> int:
    """Write the model and the tokenizer of `file`, with dequantised weights, as a Hugging Face folder.

    transformers reads weights, configuration and vocabulary, but guesses the special tokens; here they are what the
    file's header says: padding, beginning, and every token that ends an answer, in `generation_config.json` too.

    Args:
        folder: Must not exist yet; it is there only when it is complete.
        dtype: Of the weights written, the name of a torch type.

    Returns:
        The number of parameters.

    Raises:
        MissingFileError: There is no such file, or the package `gguf` is not installed.
        ConfigError: It is no GGUF file, its architecture is unknown to transformers, it has no tokenizer, or `folder`
            exists.
    """
    if not file.is_file():
        raise MissingFileError(f"there is no file {str(file)!r}; a .gguf file is needed")
    if folder.exists():
        raise ConfigError(f"{str(folder)!r} exists already: name a new folder")
    with _read_once():
        return _convert(file, folder, dtype)


def _convert(file: Path, folder: Path, dtype: str) -> int:
    special = _special_tokens(file)
    ends = [special[name] for name in _ENDS if name in special]
    if not ends:
        raise ConfigError(f"{str(file)!r} does not say which token ends an answer: its header has no eos_token_id")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read ({_first_line(error)})") from error
    named = {"bos": special.get("bos"), "eos": ends[0], "pad": special.get("padding", ends[0])}
    for name, token in named.items():
        setattr(tokenizer, f"{name}_token", None if token is None else tokenizer.convert_ids_to_tokens(token))
        for config in (model.config, model.generation_config):
            setattr(config, f"{name}_token_id", token)
    if len(ends) > 1:
        model.generation_config.eos_token_id = ends
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)
    return int(model.num_parameters())


@contextmanager
def _read_once() -> Iterator[None]:
    """Let every reader of a file be the same: transformers asks for four, and each reads the vocabulary for seconds."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise MissingFileError("reading a GGUF file takes the package gguf: pip install gguf") from error
    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _special_tokens(file: Path) -> dict[str, int]:
    """The ids of the special tokens in the file's header, by name."""
    try:
        fields: dict[str, Any] = importlib.import_module("gguf").GGUFReader(str(file)).fields
    except (ValueError, IndexError, OSError) as error:
        raise ConfigError(f"{str(file)!r} is no whole GGUF file ({_first_line(error)})") from error
    found = {name: fields.get(_SPECIAL.format(name)) for name in (*_ENDS, "bos", "padding")}
    return {name: int(field.contents()) for name, field in found.items() if field is not None}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
