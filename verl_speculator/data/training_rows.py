"""What training and validation read: rows of tokens, from token files as they are and from chats by their template.

Rows are made once for all processes of a machine and all epochs, into a memory-mapped Arrow file in the cache of
`datasets`: they may be more than memory holds, and a process reads those of its share only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from verl_speculator.data.chats import to_tools, to_turns
from verl_speculator.data.rendering import render_chat
from verl_speculator.data.token_rows import (
    INPUT_IDS,
    LOSS_MASK,
    ORIGIN,
    TOKENIZER,
    check_token_columns,
    check_token_row,
    holds_tokens,
    tokenizer_fingerprint,
)
from verl_speculator.errors import DataError, SpeculatorError

# Raised when the same file and template give other rows than before.
_VERSION = 1


@dataclass(frozen=True)
class RowSettings:
    """How files become rows; verl's settings of the same names under `data`.

    Attributes:
        key: The configuration key that names the files; errors begin with it.
        max_samples: Take so many rows, the first ones or with `shuffle` any; all unless it is positive.
    """

    key: str
    max_length: int
    truncation: str = "right"
    max_samples: int = -1
    shuffle: bool = False
    seed: int | None = None
    messages_key: str = "messages"
    tools_key: str = "tools"
    enable_thinking_key: str = "enable_thinking"
    enable_thinking_default: bool | None = None
    apply_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class TrainingRows(Dataset):
    """Rows of `input_ids`, `position_ids` and `loss_mask`, [T] each and int64, cut at `max_length`."""

    def __init__(self, files: Sequence[str], tokenizer: Any, settings: RowSettings) -> None:
        """Read the files, or find what another process has made of them.

        Raises:
            DataError: A row that cannot be trained on, such as tokens of another tokenizer or a chat that the template
                refuses; with `truncation="error"` one that is too long.
        """
        from datasets import Dataset as ArrowDataset
        from datasets import Features, List, Value
        from datasets.exceptions import DatasetGenerationError

        reader = _Reader(tuple(files), tokenizer, settings)
        chosen = _chosen_rows(sum(pq.read_metadata(file).num_rows for file in files), settings)
        try:
            self._rows = ArrowDataset.from_generator(
                reader.read,
                features=Features({INPUT_IDS: List(Value("int32")), LOSS_MASK: List(Value("int8"))}),
                gen_kwargs={"chosen": chosen},
                fingerprint=reader.fingerprint(chosen),
            ).with_format("numpy")
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, SpeculatorError):
                raise error.__cause__ from None
            raise
        self._max_length = settings.max_length
        if settings.truncation == "error":
            self._refuse_long_rows(settings)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self._rows[int(index)]
        ids, mask = (torch.from_numpy(row[name][: self._max_length]).long() for name in (INPUT_IDS, LOSS_MASK))
        return {INPUT_IDS: ids, "position_ids": torch.arange(len(ids)), LOSS_MASK: mask}

    def _refuse_long_rows(self, settings: RowSettings) -> None:
        longest = max(pc.max(pc.list_value_length(part)).as_py() for part in self._rows.data[INPUT_IDS].chunks)
        if longest > settings.max_length:
            raise DataError(
                f"{settings.key}: a row has {longest} tokens, more than data.max_length={settings.max_length}: raise "
                "it, or cut such rows with data.truncation=right"
            )


@dataclass(frozen=True)
class _Reader:
    files: tuple[str, ...]
    tokenizer: Any
    settings: RowSettings

    def read(self, chosen: list[int] | None) -> Iterator[dict[str, list[int]]]:
        """The rows, row group by row group; of `chosen` only those, ascending and counted over all files."""
        wanted = None if chosen is None else set(chosen)
        number = 0
        # Asked once: either makes a dictionary of the whole vocabulary.
        mark, vocab_size = tokenizer_fingerprint(self.tokenizer), len(self.tokenizer)
        for file in self.files:
            with pq.ParquetFile(file) as parquet:
                schema = parquet.schema_arrow
                is_tokens = holds_tokens(schema.names)
                if is_tokens:
                    check_token_columns(schema, f"{self.settings.key}: {file!r}")
                columns = [name for name in self._columns(is_tokens) if name in schema.names]
                row = 0
                for batch in parquet.iter_batches(batch_size=256, columns=columns):
                    for values in batch.to_pylist():
                        if wanted is None or number in wanted:
                            where = f"{self.settings.key}: {file!r}, row {row}"
                            if is_tokens:
                                check_token_row(values, mark, vocab_size, where)
                                own = [int(is_own) for is_own in values[LOSS_MASK]]
                                yield {INPUT_IDS: values[INPUT_IDS], LOSS_MASK: own}
                            else:
                                yield self._rendered(values, where)
                        row, number = row + 1, number + 1

    def _columns(self, is_tokens: bool) -> list[str]:
        if is_tokens:
            return [INPUT_IDS, LOSS_MASK, TOKENIZER, ORIGIN]
        return [self.settings.messages_key, self.settings.tools_key, self.settings.enable_thinking_key]

    def _rendered(self, values: dict[str, Any], where: str) -> dict[str, list[int]]:
        settings = self.settings
        options = dict(settings.apply_chat_template_kwargs)
        thinks = values.get(settings.enable_thinking_key, settings.enable_thinking_default)
        if thinks is not None:
            options["enable_thinking"] = bool(thinks)
        messages = to_turns(values[settings.messages_key], where)
        tools = to_tools(values.get(settings.tools_key), where)
        return render_chat(self.tokenizer, messages, where, tools=tools, options=options)._asdict()

    def fingerprint(self, chosen: list[int] | None) -> str:
        """Of everything that decides the rows, so that the cache's are taken only where they are the same."""
        settings, stats = self.settings, [Path(file).stat() for file in self.files]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        described = [
            _VERSION,
            [
                (str(Path(file).resolve()), stat.st_size, stat.st_mtime_ns)
                for file, stat in zip(self.files, stats, strict=True)
            ],
            chosen,
            [settings.messages_key, settings.tools_key, settings.enable_thinking_key, settings.enable_thinking_default],
            dict(settings.apply_chat_template_kwargs),
            self.tokenizer.chat_template,
            dict(self.tokenizer.special_tokens_map),
            tokenizer_fingerprint(self.tokenizer) if backend is None else backend.to_str(),
        ]
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _chosen_rows(total: int, settings: RowSettings) -> list[int] | None:
    """As verl chooses them, in the order of the files; None for all."""
    if not 0 < settings.max_samples < total:
        return None
    if not settings.shuffle:
        return list(range(settings.max_samples))
    # Seeded in any case: all processes must choose the same.
    generator = np.random.default_rng(settings.seed or 0)
    return sorted(generator.choice(total, size=settings.max_samples, replace=False).tolist())
