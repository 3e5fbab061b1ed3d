"""verl's dataset of a scorer's windows: their tokens as they were decoded, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from verl_speculator.errors import ConfigError, DataError
from verl_speculator.scorer.windows import Window, read_windows

PADDINGS = ("none", "left", "right")


class SPDRLHFDataset(Dataset):
    """Rows for verl from the files of `verl-speculator scorer data`: windows, or the prompts that they are from.

    Windows without a mismatch have nothing to decide on: they are left out and counted in `num_without_mismatch`.

    Args:
        data_files: One file or several.
        tokenizer: Only its padding token is used.
        config: verl's `data` section. `closed_loop` asks for prompts. `padding` "left" or "right" pads `input_ids` to
            `max_prompt_length + max_response_length` as tensors; with "none" they are lists.
        processor: verl's; not used.
        max_samples: Take so many rows of the first; -1 takes all.

    Raises:
        DataError: A file without windows, none of whose windows has a mismatch, or with a window that is too long.
    """

    def __init__(
        self,
        data_files: str | Sequence[str],
        tokenizer: Any,
        config: Any,
        processor: Any = None,
        max_samples: int = -1,
        **ignored: Any,
    ) -> None:
        files = [data_files] if isinstance(data_files, str) else list(data_files)
        self._pad_token = tokenizer.pad_token_id or 0
        self._padding = config.get("padding") or "none"
        if self._padding not in PADDINGS:
            raise ConfigError(f"data.padding={self._padding!r} must be one of {', '.join(PADDINGS)}")
        self._width = config.max_prompt_length + config.max_response_length
        self.scalars: tuple[str, ...] = ()
        self.num_without_mismatch = 0
        self._windows: list[tuple[str, Window]] = []
        for file in files:
            read = read_windows(file)
            if self._windows and read.scalars != self.scalars:
                raise DataError(f"{file!r} has the scalars {', '.join(read.scalars)} and the files before it others")
            self.scalars = read.scalars
            windows = _first_of_prompts(read.windows) if config.get("closed_loop") else read.windows
            for window in windows:
                if not config.get("closed_loop") and not window.mismatches:
                    self.num_without_mismatch += 1
                else:
                    self._windows.append((file, window))
        if not self._windows:
            raise DataError(
                f"none of the {self.num_without_mismatch} windows of {', '.join(files)} has a mismatch: "
                "a scorer has nothing to decide on"
            )
        if max_samples > 0:
            self._windows = self._windows[:max_samples]
        for file, window in self._windows:
            if len(window.input_ids) > self._width:
                raise DataError(
                    f"{file!r} has a window of {len(window.input_ids)} tokens, and data.max_prompt_length + "
                    f"data.max_response_length is {self._width}: raise the first"
                )
        if self.num_without_mismatch:
            print(f"{self.num_without_mismatch} windows have no mismatch and are left out")

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, window = self._windows[index]
        tokens, start = window.input_ids, window.draft_start_idx
        if self._padding == "none":
            item: dict[str, Any] = {"input_ids": tokens, "draft_start_idx": start}
        else:
            fill = [self._pad_token] * (self._width - len(tokens))
            on_left = self._padding == "left"
            mask = [0] * len(fill) + [1] * len(tokens) if on_left else [1] * len(tokens) + [0] * len(fill)
            item = {
                "input_ids": torch.tensor(fill + tokens if on_left else tokens + fill),
                "attention_mask": torch.tensor(mask),
                "draft_start_idx": torch.tensor(start + len(fill) if on_left else start),
            }
        return {
            **item,
            "target_ids": window.target_ids,
            "scalars": window.scalars,
            "scalar_names": self.scalars,
            "prompt_length": window.prompt_length,
            "strict_correct": window.strict_correct,
            "strict_calls": window.strict_calls,
            "labels": window.labels,
            "correct": window.correct,
            # What verl's trainer looks for.
            "raw_prompt": tokens[: window.prompt_length],
            "data_source": "spd",
            "reward_model": {"style": "rule", "ground_truth": window.answer},
            "extra_info": {"index": index, "prompt_index": window.prompt_index, "file": file},
            "index": index,
        }


def window_of(item: dict[str, Any], scalars: Sequence[str]) -> Window:
    """The window of a row, whatever its padding, with these scalars of it.

    Raises:
        ConfigError: The data has no such scalar.
    """
    names = list(item["scalar_names"])
    if missing := [name for name in scalars if name not in names]:
        raise ConfigError(f"the scorer reads {missing[0]!r}, and the windows of the data have {', '.join(names)}")
    tokens, start = item["input_ids"], int(item["draft_start_idx"])
    if isinstance(tokens, torch.Tensor):
        mask = item["attention_mask"].bool()
        start -= int((~mask[:start]).sum())
        tokens = tokens[mask].tolist()
    columns = [names.index(name) for name in scalars]
    return Window(
        input_ids=list(tokens),
        draft_start_idx=start,
        prompt_length=int(item["prompt_length"]),
        target_ids=list(item["target_ids"]),
        scalars=[[row[column] for column in columns] for row in item["scalars"]],
        prompt_index=int(item["extra_info"]["prompt_index"]),
        answer=item["reward_model"]["ground_truth"],
        strict_correct=bool(item["strict_correct"]),
        strict_calls=int(item["strict_calls"]),
        labels=list(item["labels"]),
        correct=list(item["correct"]),
    )


def _first_of_prompts(windows: Sequence[Window]) -> list[Window]:
    return list({window.prompt_index: window for window in reversed(windows)}.values())[::-1]
