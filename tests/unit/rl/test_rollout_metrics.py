from __future__ import annotations

import pytest

from verl_speculator.rl.rollout_metrics import Counters, rollout_metrics


def test_a_step_is_what_was_counted_in_it_by_all_servers():
    before = Counters(rounds=10, drafted=30, accepted=(5, 2), generated=40) + Counters()
    after = Counters(rounds=16, drafted=48, accepted=(9, 3, 1), generated=55) + Counters(2, 6, (1, 1, 0), 5)

    metrics = rollout_metrics(before, after, seconds=4.0)

    # 8 rounds that kept 5 drafts at the first position, 2 at the second and 1 at the third.
    assert metrics["rollout/spec_acceptance_length"] == pytest.approx(1 + 8 / 8)
    assert [metrics[f"rollout/spec_accepted_at_{i}"] for i in range(3)] == [5 / 8, 2 / 8, 1 / 8]
    assert metrics["rollout/spec_drafted_per_token"] == 24 / 20
    assert metrics["rollout/tokens_per_second"] == 20 / 4
    assert metrics["rollout/seconds"] == 4.0


def test_what_was_not_drafted_has_no_acceptance():
    metrics = rollout_metrics(Counters(generated=3), Counters(generated=9), seconds=2.0)

    assert metrics == {"rollout/seconds": 2.0, "rollout/tokens_per_second": 3.0}
