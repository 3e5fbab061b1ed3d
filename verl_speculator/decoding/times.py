"""Where the time of one generation goes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DecodingTimes:
    """Measured wall-clock seconds; `+` adds generations up.

    `prefill` is the prompts' forward pass and the choice of the first tokens, `verify` the later passes and choices; in
    plain decoding these are its one-token steps. `other` is bookkeeping, such as dropping rejected tokens from the
    cache.
    """

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return self.prefill + self.draft + self.verify + self.other

    def __add__(self, more: DecodingTimes) -> DecodingTimes:
        return DecodingTimes(
            self.prefill + more.prefill,
            self.draft + more.draft,
            self.verify + more.verify,
            self.other + more.other,
        )


class PhaseClock:
    """Sums up seconds per phase; on a GPU a phase ends when its kernels have."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = {"prefill": 0.0, "draft": 0.0, "verify": 0.0, "other": 0.0}
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """What happened since the last lap was `phase`, the name of a field of `DecodingTimes`."""
        now = self._now()
        self._seconds[phase] += now - self._last
        self._last = now

    def times(self) -> DecodingTimes:
        return DecodingTimes(**self._seconds)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
