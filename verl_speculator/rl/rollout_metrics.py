"""What vLLM counts of a rollout. Checked on vLLM 0.28.0."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any


@dataclass(frozen=True)
class Counters:
    """What a server has counted since it was started; of several servers the sum.

    Attributes:
        rounds: Of drafting and verification, one for each request in a step of the engine that drafted.
        drafted: Tokens that were drafted.
        accepted: And kept, by draft position.
        generated: All tokens of answers.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: tuple[int, ...] = ()
    generated: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            self.rounds + other.rounds,
            self.drafted + other.drafted,
            tuple(a + b for a, b in zip_longest(self.accepted, other.accepted, fillvalue=0)),
            self.generated + other.generated,
        )

    def __sub__(self, other: Counters) -> Counters:
        return Counters(
            self.rounds - other.rounds,
            self.drafted - other.drafted,
            tuple(a - b for a, b in zip_longest(self.accepted, other.accepted, fillvalue=0)),
            self.generated - other.generated,
        )


def read_counters(server: Any) -> Counters:
    """Called in the process of verl's rollout server, where vLLM keeps its statistics.

    `rollout.disable_log_stats=true` leaves them at 0.
    """
    from vllm.v1.metrics.reader import get_metrics_snapshot

    found = {metric.name: metric for metric in get_metrics_snapshot()}

    def value(name: str) -> int:
        metric: Any = found.get(f"vllm:{name}")
        return 0 if metric is None else int(metric.value)

    positions: Any = found.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    return Counters(
        rounds=value("spec_decode_num_drafts"),
        drafted=value("spec_decode_num_draft_tokens"),
        accepted=() if positions is None else tuple(map(int, positions.values)),
        generated=value("generation_tokens"),
    )


def rollout_metrics(before: Counters, after: Counters, seconds: float) -> dict[str, float]:
    """Of what was counted in between; what was not drafted has no acceptance."""
    done = after - before
    metrics = {"rollout/seconds": seconds, "rollout/tokens_per_second": done.generated / seconds}
    if done.rounds:
        metrics["rollout/spec_acceptance_length"] = 1 + sum(done.accepted) / done.rounds
        metrics["rollout/spec_drafted_per_token"] = done.drafted / max(done.generated, 1)
        for position, accepted in enumerate(done.accepted):
            metrics[f"rollout/spec_accepted_at_{position}"] = accepted / done.rounds
    return metrics
