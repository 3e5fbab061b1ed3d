"""A training run's curves as charts, and the page of one run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from verl_speculator.errors import ConfigError
from verl_speculator.reports.charts import Series, legend, line_chart, series_style
from verl_speculator.reports.curves import Curves, read_curves
from verl_speculator.reports.page import Tile, render, write_file
from verl_speculator.reports.writing import count, fixed, short

REPORT_FILE = "report.html"
LENGTH = "acceptance_length"


def write_train_report(run_dir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Plot the run in a file of its own, `report.html` in the run's folder where no other is given; returns it.

    Raises:
        SpeculatorError: The run has no log, an unreadable or an empty one, or the file cannot be written.
    """
    run = Path(run_dir)
    curves = read_curves(run)
    charts = run_charts(curves)
    if not charts:
        raise ConfigError(f"{curves.source!r} has none of the curves of a speculator's training: give its run's folder")
    if output is None:
        output = (run if run.is_dir() else run.parent) / REPORT_FILE
    name = run.resolve().name
    page = render(
        "training.html.jinja",
        title=f"Training run: {name}",
        subtitle=f"{count(curves.last_step)} steps logged",
        tiles=_tiles(curves),
        charts=charts,
        source=f"Plotted from {curves.source}",
    )
    try:
        write_file(Path(output), page)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {str(output)!r} ({error.strerror})") from error
    return Path(output)


def _tiles(curves: Curves) -> list[Tile]:
    tiles = []
    for what, name, digits in (
        ("Acceptance length, validation", "val/acceptance_length", 2),
        ("Acceptance length, training", "train/acceptance_length", 2),
        ("Loss, validation", "val/loss", 3),
        ("Loss, training", "train/loss", 3),
    ):
        points = curves.points(name)
        if points:
            step, value = points[-1]
            best = (max if "length" in name else min)(points, key=lambda point: point[1])
            more = f"at step {count(step)}; best {fixed(best[1], digits)} at step {count(best[0])}"
            tiles.append(Tile(what, fixed(value, digits), more))
    speed = [value for _, value in curves.points("perf/tokens_per_second")]
    if speed:
        mean = sum(speed) / len(speed)
        tiles.append(Tile("Tokens a second", short(mean), f"mean of {count(len(speed))} steps"))
    return tiles


@dataclass(frozen=True)
class ChartBlock:
    heading: str
    hint: str
    svg: Markup
    legend: Markup


def run_charts(curves: Curves) -> list[ChartBlock]:
    """Everything that a run logs and a person looks at; a chart without a curve is left out."""
    heads = sorted({int(name.split("_")[1].split("/")[0]) for name in _under(curves, "train/head_")})
    blocks = [
        _block(curves, "Loss", "Cross entropy in nats a token, mean over the heads.", "loss", _both("loss")),
        _block(
            curves,
            "Acceptance length",
            "Tokens per target forward on this text; closed loop: where the rounds of decoding would fall.",
            "tokens",
            _lengths(curves),
        ),
        _block(
            curves,
            "Loss per head",
            "Head 1 predicts the token after the next one, head 2 the one after that.",
            "loss",
            {f"head {index + 1}": f"train/head_{index}/loss" for index in heads},
        ),
        _block(
            curves,
            "Accuracy per head",
            "How often a head's most likely token is the right one.",
            "accuracy",
            {f"head {index + 1}": f"train/head_{index}/accuracy" for index in heads},
            from_zero=True,
        ),
        _block(curves, "Base loss", "The base model's own, where it is trained too.", "loss", _both("base_loss")),
        _block(
            curves, "Learning rate", "Of each step.", "learning rate", {"learning rate": "train/lr"}, from_zero=True
        ),
        _block(curves, "Gradient norm", "Before clipping.", "norm", {"norm": "train/grad_norm"}, from_zero=True),
        _block(
            curves,
            "Speed",
            "Tokens a second, padding not counted.",
            "tokens / s",
            {"tokens / s": "perf/tokens_per_second"},
            from_zero=True,
        ),
    ]
    return [block for block in blocks if block is not None]


def compared_charts(runs: Sequence[tuple[str, Curves]]) -> list[ChartBlock]:
    """Loss and acceptance length of several runs; one run has its curves of training and validation text."""
    if len(runs) == 1:
        wanted = ("Loss", "Acceptance length", "Accuracy per head", "Learning rate")
        return [block for block in run_charts(runs[0][1]) if block.heading in wanted]
    blocks = []
    for heading, name, unit in (("Loss", "loss", "loss"), ("Acceptance length", LENGTH, "tokens")):
        for split, hint in (("train", "On the training text."), ("val", "On the validation text.")):
            lines = [
                (Series(label, series_style(index)), curves.points(f"{split}/{name}"))
                for index, (label, curves) in enumerate(runs)
            ]
            svg = line_chart(lines, title=heading, x_label="step", y_label=unit, dots=split == "val")
            if svg:
                names = legend([series for series, points in lines if points], dashed=True)
                blocks.append(ChartBlock(heading, hint, Markup(svg), Markup(names)))
    return blocks


def _block(
    curves: Curves, heading: str, hint: str, unit: str, names: dict[str, str], *, from_zero: bool = False
) -> ChartBlock | None:
    found = [(label, curves.points(name)) for label, name in names.items() if curves.points(name)]
    if not found:
        return None
    lines = [(Series(label, series_style(index)), points) for index, (label, points) in enumerate(found)]
    svg = line_chart(
        lines, title=heading, x_label="step", y_label=unit, from_zero=from_zero, dots=max(len(p) for _, p in lines) < 20
    )
    names_of_lines = legend([series for series, _ in lines], dashed=True) if len(lines) > 1 else ""
    return ChartBlock(heading, hint, Markup(svg), Markup(names_of_lines))


def _lengths(curves: Curves) -> dict[str, str]:
    """The validation of a run measures several: `val/closed_loop_sampled_acceptance_length` is one."""
    names = [name for name in curves.names() if name.endswith(LENGTH)]
    splits = {"train": "training", "val": "validation"}
    labels = {}
    for name in sorted(names, key=lambda name: (name.partition("/")[0], len(name))):
        split, _, measure = name.partition("/")
        kind = measure.removesuffix(LENGTH).strip("_").replace("_", " ")
        labels[f"{splits.get(split, split)}{', ' if kind else ''}{kind}"] = name
    return labels


def _both(name: str) -> dict[str, str]:
    return {"training": f"train/{name}", "validation": f"val/{name}"}


def _under(curves: Curves, prefix: str) -> list[str]:
    return [name for name in curves.names(prefix) if name.count("/") == 2]
