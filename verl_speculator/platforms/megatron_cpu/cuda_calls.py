"""The functions of `torch.cuda` that Megatron calls. Checked with megatron-core 0.16.1, mbridge 0.15.1, torch 2.13.0.

They are replaced in `torch.cuda` itself and not in Megatron's modules, because Megatron imports some modules late.
`torch.cuda.is_available` stays false, so nobody who asks first is misled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verl_speculator.platforms.megatron_cpu.patches import Patch

CPU = torch.device("cpu")


def _current_device() -> torch.device:
    return CPU


def _synchronize(device: Any = None) -> None: ...


def _get_rng_state(device: Any = "cuda") -> Tensor:
    return torch.get_rng_state()


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def cuda_patches() -> list[Patch]:
    return [
        Patch(torch.cuda, "current_device", _current_device),
        Patch(torch.cuda, "synchronize", _synchronize),
        Patch(torch.cuda, "get_rng_state", _get_rng_state),
        Patch(torch.cuda, "manual_seed", _manual_seed),
    ]
