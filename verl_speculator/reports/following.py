"""The curves of a reinforcement learning whose rollout is drafted: what was accepted, and how far the policy went."""

from __future__ import annotations

from markupsafe import Markup

from verl_speculator.reports.blocks import ChartBlock, curve_block
from verl_speculator.reports.charts import Series, legend, scatter_chart, series_style
from verl_speculator.reports.curves import Curves
from verl_speculator.reports.page import Tile
from verl_speculator.reports.writing import between, count, fixed, short

LIVE = "actor/speculator/live_acceptance_length"
FROZEN = "actor/speculator/frozen_acceptance_length"
DIFFERENCE = "actor/speculator/acceptance_length_difference"
ROLLOUT = "rollout/spec_acceptance_length"
KL = "rollout/kl_to_first_policy"
REWARD = "critic/score/mean"


def following_charts(curves: Curves) -> list[ChartBlock]:
    """None where the run drafted nothing."""
    if not curves.points(ROLLOUT) and not curves.points(LIVE):
        return []
    blocks = [
        curve_block(
            curves,
            "Acceptance length of the rollouts",
            "Tokens per target forward: of the speculator that learns and of the one it was, along the same rollouts, "
            "and as vLLM counted it.",
            "tokens",
            {"follows": LIVE, "frozen": FROZEN, "vLLM": ROLLOUT},
        ),
        curve_block(
            curves,
            "What following brings",
            "The difference of the two on the same rollouts, with its 95 % interval.",
            "tokens",
            {"difference": DIFFERENCE, "from": f"{DIFFERENCE}_low", "to": f"{DIFFERENCE}_high"},
        ),
        _over_distance(curves),
        curve_block(curves, "Reward", "Mean of a step's rollouts.", "reward", {"reward": REWARD}),
        curve_block(
            curves,
            "Distance to the first policy",
            "KL divergence in nats a token, on the rollouts.",
            "nats",
            {"KL": KL},
            from_zero=True,
        ),
        curve_block(
            curves,
            "Speed of the rollout",
            "Tokens of answers a second, from the first prompt sent to the last answer.",
            "tokens / s",
            {"tokens / s": "rollout/tokens_per_second"},
            from_zero=True,
        ),
        curve_block(
            curves,
            "Whether it learnt",
            "1 in the steps in which it did.",
            "",
            {"learnt": "actor/speculator/learns"},
            from_zero=True,
        ),
    ]
    return [block for block in blocks if block is not None]


def following_tiles(curves: Curves) -> list[Tile]:
    """The last quarter of the run."""
    tiles = []
    for what, name in (("Acceptance length, follows", LIVE), ("Acceptance length, frozen", FROZEN)):
        if points := curves.points(name):
            tiles.append(Tile(what, fixed(quarter_mean(points, last=True)), f"at first {fixed(points[0][1])}"))
    if points := curves.points(DIFFERENCE):
        low, high = (curves.points(f"{DIFFERENCE}_{end}")[-1][1] for end in ("low", "high"))
        step = f"at step {count(points[-1][0])}: {between(low, high)}"
        tiles.append(Tile("Following brings", fixed(quarter_mean(points, last=True)), step, unit="tokens"))
    return tiles


def quarter_mean(points: list[tuple[int, float]], *, last: bool) -> float:
    """The mean of the first or the last quarter of a curve."""
    size = -(-len(points) // 4)
    values = [value for _, value in (points[-size:] if last else points[:size])]
    return sum(values) / len(values)


def _over_distance(curves: Curves) -> ChartBlock | None:
    distance = dict(curves.points(KL))
    found = {
        name: [(distance[step], value) for step, value in curves.points(curve) if step in distance]
        for name, curve in (("follows", LIVE), ("frozen", FROZEN))
    }
    series = {name: Series(name, series_style(index)) for index, name in enumerate(found) if found[name]}
    if not series:
        return None
    svg = scatter_chart(
        [(one, *found[name][-1]) for name, one in series.items()],
        [(one, found[name]) for name, one in series.items()],
        title="Acceptance length over distance",
        x_label="KL to the first policy, nats a token",
        y_label="tokens",
        write=short,
        reference=0.0,
        reference_label="first policy",
    )
    hint = "Every step of the run, by how far the policy had gone from the first one."
    return ChartBlock("Acceptance over distance", hint, Markup(svg), Markup(legend(list(series.values()))))
