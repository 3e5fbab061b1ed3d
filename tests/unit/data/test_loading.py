from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from verl_speculator.data.loading import PaddedEvaluation, ResumableSampler


class Rows(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([index, index]), "loss_mask": torch.tensor([0, 1])}


def global_batches(num_ranks: int, batch: int, epoch: int, skip: int = 0) -> list[set[int]]:
    """What all ranks together see, batch by batch."""
    share = batch // num_ranks
    orders = []
    for rank in range(num_ranks):
        sampler = ResumableSampler(Rows(103), rank, num_ranks, seed=7)
        sampler.set_epoch(epoch)
        sampler.skip_once(skip)
        orders.append(list(sampler))
    count = min(len(order) for order in orders) // share
    return [{i for order in orders for i in order[k * share : (k + 1) * share]} for k in range(count)]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(num_ranks: int) -> None:
    assert global_batches(num_ranks, 12, epoch=2) == global_batches(1, 12, epoch=2)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_skipping_enters_the_epoch_where_it_was_left(num_ranks: int) -> None:
    assert global_batches(num_ranks, 12, epoch=1, skip=36) == global_batches(1, 12, epoch=1)[3:]


def test_skipping_counts_for_one_epoch_only() -> None:
    sampler = ResumableSampler(Rows(20), 0, 1, seed=0)
    sampler.skip_once(15)
    assert len(list(sampler)) == 5
    assert len(list(sampler)) == 20


def test_epochs_are_shuffled_differently() -> None:
    assert global_batches(1, 12, epoch=0) != global_batches(1, 12, epoch=1)


@pytest.mark.parametrize(("rows", "multiple", "length"), [(5, 4, 8), (8, 4, 8), (1, 6, 6)])
def test_padded_evaluation_adds_rows_that_train_nothing(rows: int, multiple: int, length: int) -> None:
    padded = PaddedEvaluation(Rows(rows), multiple)
    items = [padded[i] for i in range(len(padded))]
    assert len(items) == length
    assert sum(int(item["loss_mask"].sum()) for item in items) == rows
    assert [int(item["input_ids"][0]) for item in items[:rows]] == list(range(rows))
