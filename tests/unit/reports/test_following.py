from __future__ import annotations

import json

from verl_speculator.reports.curves import Curves
from verl_speculator.reports.following import (
    DIFFERENCE,
    FROZEN,
    KL,
    LIVE,
    ROLLOUT,
    following_charts,
    following_tiles,
    quarter_mean,
)
from verl_speculator.reports.training import write_train_report


def metrics(step: int) -> dict[str, float]:
    difference = 0.1 * step
    return {
        LIVE: 2.0,
        FROZEN: 2.0 - difference,
        ROLLOUT: 2.02,
        DIFFERENCE: difference,
        f"{DIFFERENCE}_low": difference - 0.05,
        f"{DIFFERENCE}_high": difference + 0.05,
        KL: 0.02 * step,
        "rollout/tokens_per_second": 100.0,
    }


def curves() -> Curves:
    return Curves("run", {name: {step: metrics(step)[name] for step in range(8)} for name in metrics(0)})


def test_charts_are_of_what_was_logged():
    charts = {chart.heading: chart for chart in following_charts(curves())}

    assert [*charts] == [
        "Acceptance length of the rollouts",
        "What following brings",
        "Acceptance over distance",
        "Distance to the first policy",
        "Speed of the rollout",
    ]
    assert "follows" in charts["Acceptance over distance"].legend
    assert all("<svg" in chart.svg for chart in charts.values())


def test_another_run_has_none_of_them():
    other = Curves("run", {"train/loss": {1: 2.0}})
    assert following_charts(other) == []
    assert following_tiles(other) == []


def test_tiles_say_the_last_quarter():
    follows, frozen, difference = following_tiles(curves())

    assert (follows.number, frozen.number, difference.number) == ("2.00", "1.35", "0.65")
    assert difference.more == "at step 7: 0.65 to 0.75"


def test_a_quarter_of_a_few_steps_is_at_least_one():
    points = [(step, float(step)) for step in range(6)]
    assert (quarter_mean(points, last=False), quarter_mean(points, last=True)) == (0.5, 4.5)
    assert quarter_mean(points[:1], last=True) == 0.0


def test_the_page_of_a_run_has_them(tmp_path):
    lines = [json.dumps({"step": step, "metrics": metrics(step)}) for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_train_report(tmp_path).read_text()

    assert "What following brings" in page
