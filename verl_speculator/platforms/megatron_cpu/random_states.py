"""Megatron's tracker of random states with the CPU's generator for CUDA's. Checked with megatron-core 0.16.1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import random
from torch import Tensor

from verl_speculator.platforms.megatron_cpu.patches import Patch


class CpuRngStatesTracker(random.CudaRNGStatesTracker):
    """Megatron's own, but for its warning that the CPU's generator was drawn from: here it is the one."""

    _current_state_name: str

    @contextmanager
    def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the state `name`, which keeps its place; the state outside is as before. Nests."""
        if name not in self.states_:
            raise KeyError(f"random state {name!r} was not added")
        outer_name, outer_state = self._current_state_name, torch.get_rng_state()
        if outer_name in self.states_:
            self.states_[outer_name] = outer_state
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            # The same state may have been forked twice: then it goes on from where the inner one stopped.
            torch.set_rng_state(self.states_.get(outer_name, outer_state))
            self._current_state_name = outer_name


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def random_patches() -> list[Patch]:
    return [
        Patch(random, "CudaRNGStatesTracker", CpuRngStatesTracker),
        Patch(random, "_get_cuda_rng_state", _get_rng_state),
        Patch(random, "_set_cuda_rng_state", _set_rng_state),
    ]
