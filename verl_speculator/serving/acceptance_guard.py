"""A word of warning when next to nothing of the first drafts is accepted, since nothing else would show it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger("vllm.verl_speculator")

FIRST_DRAFTS = 1000
# Acceptance length below 1.02; a speculator that has learnt anything has more, even on text unlike its training data.
LEAST_RATE = 0.02


class AcceptanceGuard:
    """Counts on the device and looks at the sum once, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.drafts = 0
        self.accepted = torch.zeros((), dtype=torch.long, device=device)
        self.copied: Tensor | None = None
        self.event: torch.cuda.Event | None = None
        self.is_done = False

    def count(self, accepted: Tensor, drafts: int) -> None:
        """A step that verified the drafts of `drafts` requests; `accepted` [B] of each request's tokens."""
        if self.is_done:
            return
        if self.copied is None:
            self.drafts += drafts
            self.accepted += accepted.sum()
            if self.drafts < FIRST_DRAFTS:
                return
            self.copied = self.accepted.to("cpu", non_blocking=True)
            if self.accepted.is_cuda:
                self.event = torch.cuda.Event()
                self.event.record()
        if self.event is None or self.event.query():
            self._judge(int(self.copied))

    def _judge(self, accepted: int) -> None:
        self.is_done = True
        if accepted >= LEAST_RATE * self.drafts:
            return
        logger.warning(
            "Of the first %d drafts only %d tokens were accepted, so the speculator slows this server down. Likely it "
            "was trained for another base model, another version or quantisation of it, or other text than this; most "
            "requests may use a LoRA adapter; or its weights were not loaded. `verl-speculator eval` on the same "
            "prompts tells whether it is the speculator or the engine.",
            *(self.drafts, accepted),
        )
