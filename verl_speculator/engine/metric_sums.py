"""Sums and counts of a step, added up over micro-batches and ranks in one collective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SUMS_KEY = "sums"


def reduce_sums(per_micro_batch: Sequence[Mapping[str, Tensor]], group: Any, device: Any) -> dict[str, float]:
    """Add up metrics that have the same keys in every micro-batch and on every rank of ``group``.

    float64, so that counts of tokens stay exact.
    """
    names = list(per_micro_batch[0])
    rows = [torch.stack([sums[name].detach().double() for name in names]) for sums in per_micro_batch]
    total = torch.stack(rows).sum(dim=0).to(device)
    torch.distributed.all_reduce(total, group=group)
    return dict(zip(names, total.tolist(), strict=True))
