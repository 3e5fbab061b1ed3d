"""Data loaders whose position is a number of samples, the same on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler


class ResumableSampler(DistributedSampler):
    """Shuffles each epoch alike for any number of ranks, so that k global batches hold the same samples for all.

    Rank r takes every R-th sample from r on; R ranks with 1/R of the batch each then cover the same stretch of the
    shuffled order. An epoch can therefore be entered in the middle by counting samples.
    """

    def __init__(self, dataset: Dataset, rank: int, num_ranks: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_ranks, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self._skip = 0

    def skip_once(self, samples: int) -> None:
        """Start the next epoch after this many samples, counted over all ranks."""
        self._skip = samples // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())[self._skip :]
        self._skip = 0
        return iter(indices)


class PaddedEvaluation(Dataset):
    """A dataset made divisible by `multiple` with repeats of its rows that have an empty loss mask.

    Every rank then gets the same number of rows, none is left out, and the repeats count for nothing.
    """

    def __init__(self, dataset: Any, multiple: int) -> None:
        self._dataset = dataset
        self._length = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        num_rows = len(self._dataset)
        item = self._dataset[index % num_rows]
        if index < num_rows:
            return item
        return {**item, "loss_mask": torch.zeros_like(item["loss_mask"])}
