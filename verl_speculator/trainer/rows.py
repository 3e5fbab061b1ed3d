"""Which dataset a run reads: tokens and chats by our own, everything else by verl's."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset
from verl.trainer.sft_trainer import create_sft_dataset
from verl.utils.fs import copy_local_path_from_hdfs

from verl_speculator.data.chats import resolve_files
from verl_speculator.data.token_rows import holds_tokens
from verl_speculator.data.training_rows import RowSettings, TrainingRows
from verl_speculator.errors import ConfigError

_OF_VERL = ("max_length", "truncation", "shuffle", "seed", "messages_key", "tools_key", "enable_thinking_key")


def build_rows(data: DictConfig, name: str, max_samples: int, tokenizer: Any, processor: Any) -> Dataset:
    """The rows of `data.NAME`, a list of files.

    verl's own dataset reads for a base that also sees (`processor`), where a user wants the turns rendered one by one
    (`data.ignore_input_ids_mismatch`), and whatever `data.custom_cls` is.

    Raises:
        SpeculatorError: A row that cannot be trained on.
    """
    key = f"data.{name}"
    files = [copy_local_path_from_hdfs(file) for file in resolve_files(data[name], key)]
    if data.custom_cls.path is None:
        reason = (
            "data.ignore_input_ids_mismatch=true has turns rendered, and they are rendered already: leave it out"
            if data.ignore_input_ids_mismatch
            else "the base also reads images, for which rows must be chats"
        )
        if processor is None and not data.ignore_input_ids_mismatch:
            given = {name: data[name] for name in _OF_VERL if data.get(name) is not None}
            thinks = data.get("enable_thinking_default")
            options: Any = OmegaConf.to_container(OmegaConf.create(data.get("apply_chat_template_kwargs") or {}))
            settings = RowSettings(
                key,
                max_samples=max_samples,
                # verl's configuration has the word where it means null.
                enable_thinking_default=None if thinks == "none" else thinks,
                apply_chat_template_kwargs=options,
                **given,
            )
            return TrainingRows(files, tokenizer, settings)
        for file in files:
            if holds_tokens(pq.read_schema(file).names):
                raise ConfigError(f"{key}: {file!r} holds tokens, but {reason}")
    return create_sft_dataset(files, data, tokenizer, processor, max_samples=max_samples)
