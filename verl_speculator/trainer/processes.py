"""What the processes of a run must agree on, for one process a rank (torchrun) and for a driver of workers (Ray)."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from verl_speculator.errors import SpeculatorError

T = TypeVar("T")


class Processes(ABC):
    """The processes that run the training loop; all of them call the same methods in the same order."""

    @property
    @abstractmethod
    def is_first(self) -> bool:
        """Whether this is the one that writes what there is one of, and speaks for all."""

    @abstractmethod
    def from_first(self, value: Any) -> Any:
        """The first process's value, on every process."""

    def on_first(self, act: Callable[[], T]) -> T:
        """What the first process gets from `act`; if that fails there, no process goes on."""
        result: Any = None
        failure: Exception | None = None
        if self.is_first:
            try:
                result = act()
            except (SpeculatorError, OSError) as error:
                failure = error
        # The failure itself stays here: not every error can be sent to another process.
        failed, result = self.from_first((failure is not None, result))
        if failure is not None:
            raise failure
        if failed:
            # The first process says why, once.
            raise SystemExit(2)
        return result

    @abstractmethod
    def is_any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""

    @abstractmethod
    def largest(self, value: float) -> float:
        """The largest value of any process."""

    @abstractmethod
    def that_miss(self, file: Path) -> list[int]:
        """The ranks that train and do not see a file that the first process has just written."""


class TorchrunProcesses(Processes):
    """Needs the process group. Small messages travel by its CPU backend, so that no device has to wait."""

    @property
    def is_first(self) -> bool:
        return dist.get_rank() == 0

    def from_first(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def is_any(self, flag: bool) -> bool:
        flags = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def largest(self, value: float) -> float:
        values = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.item()

    def that_miss(self, file: Path) -> list[int]:
        seen = torch.zeros(dist.get_world_size(), dtype=torch.uint8)
        seen[dist.get_rank()] = comes_to_sight(file)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return seen.logical_not().nonzero().flatten().tolist()


class RayDriver(Processes):
    """The one process that runs the loop; its workers are asked about files.

    Args:
        workers: a group of `SpeculatorTrainingWorker`.
    """

    def __init__(self, workers: Any) -> None:
        self._workers = workers

    @property
    def is_first(self) -> bool:
        return True

    def from_first(self, value: Any) -> Any:
        return value

    def is_any(self, flag: bool) -> bool:
        return flag

    def largest(self, value: float) -> float:
        return value

    def that_miss(self, file: Path) -> list[int]:
        return [rank for rank, sees in enumerate(self._workers.sees(str(file))) if not sees]


def comes_to_sight(file: Path, patience_s: float = 60) -> bool:
    """Whether the file is there, or is before long: a network file system shows others' files with a delay."""
    deadline = time.monotonic() + patience_s
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
