"""Counts the drafts that only an acceptance rule has kept, beside vLLM's own counters of speculative decoding."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("vllm.verl_speculator")

# Workers are other processes than the server that shows metrics. `PROMETHEUS_MULTIPROC_DIR`, which `serve` sets, has
# prometheus_client add them up; in one process it needs nothing. The log has the number in any case.
NAME = "vllm:spec_decode_lossy_accepted"
SECONDS_BETWEEN_LINES = 10.0


class LossyCounter:
    """Adds up on the device and looks at the sum without waiting for it, so on a GPU a step or two late."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.long, device=device)
        self._copied: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self._told = 0
        self._last_line = time.monotonic()

    def add(self, count: Tensor) -> None:
        self.total += count
        if self._copied is None:
            self._copied = self.total.to("cpu", non_blocking=True)
            if self.total.is_cuda:
                self._event = torch.cuda.Event()
                self._event.record()
        if self._event is None or self._event.query():
            total, self._copied = int(self._copied), None
            self._tell(total)

    def _tell(self, total: int) -> None:
        if total == self._told:
            return
        _counter().inc(total - self._told)
        self._told = total
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            logger.info("Lossy: %d drafts so far were kept by the acceptance rule alone.", total)


def _counter() -> Any:
    import prometheus_client

    # vLLM clears its names when it makes a new engine in a process, so it is looked up anew.
    known = prometheus_client.REGISTRY._names_to_collectors.get(NAME)
    if known is not None:
        return known
    return prometheus_client.Counter(NAME, "Drafts that only the acceptance rule has kept: lossy.")
