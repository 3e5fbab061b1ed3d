"""A chart with what stands around it on a page."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from verl_speculator.reports.charts import Series, legend, line_chart, series_style
from verl_speculator.reports.curves import Curves


@dataclass(frozen=True)
class ChartBlock:
    heading: str
    hint: str
    svg: Markup
    legend: Markup


def curve_block(
    curves: Curves, heading: str, hint: str, unit: str, names: dict[str, str], *, from_zero: bool = False
) -> ChartBlock | None:
    """Some curves of a run, by what they are called in the chart; None where the run has none of them."""
    found = [(label, curves.points(name)) for label, name in names.items() if curves.points(name)]
    if not found:
        return None
    lines = [(Series(label, series_style(index)), points) for index, (label, points) in enumerate(found)]
    svg = line_chart(
        lines, title=heading, x_label="step", y_label=unit, from_zero=from_zero, dots=max(len(p) for _, p in lines) < 20
    )
    names_of_lines = legend([series for series, _ in lines], dashed=True) if len(lines) > 1 else ""
    return ChartBlock(heading, hint, Markup(svg), Markup(names_of_lines))
