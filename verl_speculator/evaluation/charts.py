"""Charts as inline SVG, drawn with the page's colours: classes `c0`, `c1`, ... are its series, `base` the baseline.

A chart scales with its column. Shapes and dashes tell series apart as well as colours do, and every mark has a title
that a browser shows on hovering. All text is escaped here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from verl_speculator.evaluation.scale import Scale, nice_ticks, tick_labels, whole_ticks
from verl_speculator.evaluation.text import visible

WIDTH, HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 12, 16, 46
_MAX_POINTS = 240
NUM_COLOURS = 6
_CHARACTER = 7.0  # width of one in a value's label

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """`style` is the class of its colour: `c0` ... or `base`."""

    name: str
    style: str


@dataclass(frozen=True)
class RangeRow:
    """A value with an interval, and what was predicted of it."""

    series: Series
    value: float
    low: float
    high: float
    predicted: float | None = None


def series_style(index: int) -> str:
    return f"c{index % NUM_COLOURS}"


def bar_chart(
    categories: Sequence[str],
    bars: Sequence[tuple[Series, Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    write: Format,
    reference: float | None = None,
) -> str:
    """Groups of bars side by side; a series may have fewer values than there are categories.

    `reference` is a value to compare them with: a dashed line across.
    """
    heights = [value for _, values in bars for value in values]
    ticks = nice_ticks(0.0, max([*heights, reference or 0.0]) or 1.0)
    y = Scale(ticks[0], ticks[-1], HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(ticks, [write(tick) for tick in ticks], y), _axis_labels(x_label, y_label)]
    slot = (WIDTH - _LEFT - _RIGHT) / max(len(categories), 1)
    width = min(slot * 0.78 / max(len(bars), 1), 46)
    for index, category in enumerate(categories):
        middle = _LEFT + slot * (index + 0.5)
        parts.append(_text(middle, HEIGHT - _BOTTOM + 17, category, "tick", "middle"))
        for place, (series, values) in enumerate(bars):
            if index >= len(values):
                continue
            left = middle + (place - len(bars) / 2) * width
            parts.append(_bar(left, width, y, values[index], f"{series.name}, {category}", write, series.style))
    if reference is not None:
        at = y(reference)
        parts.append(f'<line class="reference" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    return _svg(parts, title)


def _bar(left: float, width: float, y: Scale, value: float, what: str, write: Format, style: str) -> str:
    top, bottom = y(value), y(0)
    text = write(value)
    label = _text(left + width / 2, top - 4, text, "value", "middle") if width >= _CHARACTER * len(text) else ""
    return (
        f'<g><title>{_safe(what)}: {_safe(text)}</title><rect class="fill {style}" x="{left + 1:.1f}" '
        f'y="{top:.1f}" width="{max(width - 2, 1):.1f}" height="{max(bottom - top, 0.5):.1f}" rx="2"/>{label}</g>'
    )


def range_chart(
    rows: Sequence[RangeRow], *, title: str, x_label: str, write: Format, reference: float, reference_label: str
) -> str:
    """A row for each series: a dot with its interval, a hollow diamond for the prediction, a line at `reference`."""
    values = [reference, *(v for row in rows for v in (row.low, row.high, row.value, row.predicted) if v is not None)]
    ticks = nice_ticks(min(values), max(values))
    x = Scale(ticks[0], ticks[-1], 16, WIDTH - 20)
    top = 22
    row_height = max(46.0, min(72.0, (HEIGHT - 46 - top) / max(len(rows), 1)))
    bottom = top + row_height * len(rows)
    parts = [
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>'
        + _text(x(tick), bottom + 17, label, "tick", "middle")
        for tick, label in zip(ticks, [write(tick) for tick in ticks], strict=True)
    ]
    at = x(reference)
    parts.append(f'<line class="reference" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 4}" y2="{bottom}"/>')
    parts.append(_text(at, top - 8, reference_label, "tick", "start" if at < WIDTH / 2 else "end"))
    parts.append(_text(WIDTH / 2, bottom + 38, x_label, "label", "middle"))
    for index, row in enumerate(rows):
        parts.append(_range_row(row, x, top + row_height * index, write))
    return _svg(parts, title, height=bottom + 46)


def _range_row(row: RangeRow, x: Scale, top: float, write: Format) -> str:
    middle = top + 31
    said = f"{write(row.value)} ({write(row.low)} to {write(row.high)})"
    shown, predicted = said, ""
    if row.predicted is not None:
        said += f", predicted {write(row.predicted)}"
        shown = f"{write(row.value)}, predicted {write(row.predicted)}"
        at = x(row.predicted)
        predicted = f'<path class="hollow {row.series.style}" d="M{at:.1f} {middle - 7:.1f}l7 7l-7 7l-7 -7z"/>'
    at = x(row.value)
    room = int((WIDTH - 44 - _CHARACTER * len(shown)) / (_CHARACTER + 1))
    return (
        f"<g><title>{_safe(row.series.name)}: {_safe(said)}</title>"
        + _text(18, top + 15, _shortened(row.series.name, room), "name", "start")
        + _text(WIDTH - 20, top + 15, shown, "value", "end")
        + f'<line class="stroke thick {row.series.style}" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" '
        f'y1="{middle:.1f}" y2="{middle:.1f}"/>{predicted}'
        f'<circle class="fill {row.series.style}" cx="{at:.1f}" cy="{middle:.1f}" r="5.5"/></g>'
    )


def line_chart(
    lines: Sequence[tuple[Series, Sequence[tuple[int, float]]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    dots: bool = False,
) -> str:
    """Values over steps. A line with more points than can be told apart shows averages of neighbours."""
    drawn = [(series, _thinned(points)) for series, points in lines if points]
    points = [point for _, line in drawn for point in line]
    if not points:
        return ""
    steps, values = [step for step, _ in points], [value for _, value in points]
    ticks = nice_ticks(min(0.0, *values) if from_zero else min(values), max(values))
    first, last = min(steps), max(steps)
    x = Scale(first, max(last, first + 1), _LEFT + 4, WIDTH - _RIGHT - 4)
    y = Scale(ticks[0], ticks[-1], HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(ticks, tick_labels(ticks), y), _axis_labels(x_label, y_label)]
    for tick in whole_ticks(int(first), int(last)):
        parts.append(_text(x(tick), HEIGHT - _BOTTOM + 17, tick_labels([tick])[0], "tick", "middle"))
    parts += [_line(series, line, x, y, index, dots) for index, (series, line) in enumerate(drawn)]
    return _svg(parts, title)


def _line(series: Series, points: Sequence[tuple[float, float]], x: Scale, y: Scale, index: int, dots: bool) -> str:
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    last_step, last = points[-1]
    said = f"{series.name}: {tick_labels([last])[0]} at {tick_labels([last_step])[0]}"
    marks = points if dots or len(points) == 1 else points[-1:]
    circles = "".join(
        f'<circle class="fill {series.style}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3">'
        f"<title>{_safe(series.name)}: {tick_labels([value])[0]} at {tick_labels([step])[0]}</title></circle>"
        for step, value in marks
    )
    return (
        f'<g><title>{_safe(said)}</title><polyline class="stroke {series.style} dash{index % NUM_COLOURS}" '
        f'points="{path}"/>{circles}</g>'
    )


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _MAX_POINTS)
    chunks = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    return [(sum(s for s, _ in chunk) / len(chunk), sum(v for _, v in chunk) / len(chunk)) for chunk in chunks]


def legend(series: Sequence[Series], *, dashed: bool = False) -> str:
    """The names of the series, as HTML; `dashed` for those of a line chart."""
    items = []
    for index, one in enumerate(series):
        mark = (
            f'<svg viewBox="0 0 26 10" width="26" height="10" aria-hidden="true">'
            f'<line class="stroke {one.style} dash{index % NUM_COLOURS}" x1="1" x2="25" y1="5" y2="5"/></svg>'
            if dashed
            else f'<i class="swatch {one.style}"></i>'
        )
        items.append(f"<li>{mark}{_safe(one.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _grid(ticks: Sequence[float], labels: Sequence[str], y: Scale) -> str:
    return "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        + _text(_LEFT - 6, y(tick) + 4, label, "tick", "end")
        for tick, label in zip(ticks, labels, strict=True)
    )


def _axis_labels(x_label: str, y_label: str) -> str:
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    return (
        _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, x_label, "label", "middle")
        + f'<text class="label" text-anchor="middle" transform="translate(13 {middle:.1f}) rotate(-90)">'
        f"{_safe(y_label)}</text>"
    )


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_safe(text)}</text>'


def _svg(parts: Sequence[str], title: str, height: float = HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{_safe(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def _safe(text: str) -> str:
    return escape(visible(text), quote=True)
