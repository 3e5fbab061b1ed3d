"""The speculator that learns beside the one that it was: what each would have accepted of the same rollouts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl_speculator.losses import PackedHiddenStates, rounds_per_sequence
from verl_speculator.models import ChainSpeculator

# Half the width of a 95 % interval, in standard errors.
_INTERVAL = 1.96


class PairedMonitor:
    """Acceptance lengths of both, and their difference with its interval, over what is measured in a step.

    Both write the same tokens, so the noise of easy and hard rollouts cancels. Each sequence counts as one draw. The
    interval is that of a difference of two ratios by linearisation (Cochran 1977, Sampling Techniques, 6.4).

    Args:
        frozen: The speculator of the beginning, whole on every rank, in the type in which the live one computes.
    """

    def __init__(self, frozen: ChainSpeculator) -> None:
        self.frozen = frozen.requires_grad_(False).eval()
        self._forget()

    def _forget(self) -> None:
        # How many sequences, the sum of their (rounds, accepted) live and frozen, and that of the squares of these.
        self._count = torch.zeros(1, dtype=torch.float64)
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._squares = torch.zeros(4, 4, dtype=torch.float64)

    def measure(self, live: ChainSpeculator, packed: PackedHiddenStates) -> None:
        """Add this rank's sequences; every rank calls this, with sequences of its own."""
        rows_B4 = torch.cat([rounds_per_sequence(one, packed).cpu() for one in (live, self.frozen)], dim=1)
        rows_B4 = rows_B4[rows_B4[:, 0] > 0]
        self._count += len(rows_B4)
        self._sums += rows_B4.sum(dim=0)
        self._squares += rows_B4.T @ rows_B4

    def finish(self, device: Any) -> dict[str, float]:
        """What all ranks have measured since the last call; nothing where no answer has a token to draft."""
        totals = torch.cat([self._count, self._sums, self._squares.flatten()]).to(device)
        dist.all_reduce(totals)
        self._forget()
        count, sums, squares = float(totals[0]), totals[1:5].cpu(), totals[5:].reshape(4, 4).cpu()
        return paired_lengths(count, sums, squares) if count else {}


def paired_lengths(count: float, sums: Tensor, squares: Tensor) -> dict[str, float]:
    """Acceptance lengths `1 + accepted / rounds` and their difference, from sums over sequences.

    Args:
        count: Sequences.
        sums: [4], of (live rounds, live accepted, frozen rounds, frozen accepted).
        squares: [4, 4], of their products.
    """
    live, frozen = (1 + float(sums[i + 1] / sums[i]) for i in (0, 2))
    # How the difference changes with each sum; a sequence's share of it sums to 0 over the sequences.
    slopes = torch.stack(
        [-(live - 1) / sums[0], 1 / sums[0], (frozen - 1) / sums[2], -1 / sums[2]],
    )
    variance = float(slopes @ squares @ slopes) * count / max(count - 1, 1)
    half = _INTERVAL * max(variance, 0.0) ** 0.5
    return {
        "live_acceptance_length": live,
        "frozen_acceptance_length": frozen,
        "acceptance_length_difference": live - frozen,
        "acceptance_length_difference_low": live - frozen - half,
        "acceptance_length_difference_high": live - frozen + half,
    }


class Adaptation:
    """Whether following makes a difference: learning stops while it is within noise and goes on when it opens.

    It looks at the mean difference of the last measured steps. While it stops, a step now and then still learns: else
    the live speculator would stay as it is, and no difference could ever open.
    """

    WINDOW = 8
    PROBE_EVERY = 8

    def __init__(self) -> None:
        self.is_on = True
        self._recent: deque[tuple[float, float]] = deque(maxlen=self.WINDOW)

    def learns(self, step: int) -> bool:
        return self.is_on or step % self.PROBE_EVERY == 0

    def note(self, metrics: Mapping[str, float]) -> None:
        """Take in what a step's monitor has found."""
        if not metrics:
            return
        difference = metrics["acceptance_length_difference"]
        self._recent.append((difference, metrics["acceptance_length_difference_high"] - difference))
        mean = sum(one for one, _ in self._recent) / len(self._recent)
        half = sum(half**2 for _, half in self._recent) ** 0.5 / len(self._recent)
        opens = mean - half > 0
        if opens or len(self._recent) == self.WINDOW:
            self.is_on = opens

    def state_dict(self) -> dict[str, Any]:
        return {"is_on": self.is_on, "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.is_on = state["is_on"]
        self._recent = deque(map(tuple, state["recent"]), maxlen=self.WINDOW)
