"""Whether a frozen base may stay gathered from one forward pass to the next: `engine.reshard_after_forward=auto`."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from verl.utils.device import get_device_id, get_torch_device

# Of the memory that is free while the base is built. The speculator, its optimizer and the activations come later.
_SHARE = 1 / 3


def fits_gathered(base: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the whole base, in the type in which it computes, fits on every device beside what else a step needs.

    Every rank calls this, and all get the same answer: a layer is gathered by all of them or by none.

    Args:
        base: With all of its parameters, with or without storage.
        dtype: In which layers are gathered.
    """
    needed = sum(parameter.numel() for parameter in base.parameters()) * dtype.itemsize
    fits = torch.tensor([needed <= _SHARE * _free_bytes()], dtype=torch.int32, device=get_device_id())
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    answer = bool(fits.item())
    if dist.get_rank() == 0:
        how = "stays gathered" if answer else "is gathered layer by layer"
        print(f"engine.reshard_after_forward=auto: the base takes {needed / 1e9:.3g} GB in full and {how}.")
    return answer


def _free_bytes() -> float:
    if torch.accelerator.is_available():
        return float(get_torch_device().mem_get_info()[0])
    # All processes share it: several machines without accelerators are for tests.
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / dist.get_world_size()
