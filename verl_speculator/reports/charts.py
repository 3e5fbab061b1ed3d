"""Charts as SVG for a page, drawn by matplotlib in the page's own colours and font.

matplotlib knows nothing of a page that can be light or dark. It draws each of the page's colours as a stand-in, for
which the SVG gets the CSS variable, so that a chart changes with its page. Dashes and direct labels tell series apart
as well as colours do, and every mark has a title that a browser shows on hovering.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from verl_speculator.reports.writing import short, visible

WIDTH, HEIGHT = 460, 270  # a chart's own units, which the page scales to its column
NUM_COLOURS = 6
_MAX_POINTS = 240  # of a line; more cannot be told apart
_SYMMETRIC_TICKS = (-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)  # times a reference
_CHARACTER = 7.0  # width of one in a label

# A colour's stand-in and the page's variable for it, which templates/style.css sets.
_VARIABLES = {name: f"var(--{name})" for name in ("ink", "soft", "grid", "card")}
_VARIABLES |= {f"c{index}": f"var(--s{index})" for index in range(NUM_COLOURS)} | {"base": "var(--sbase)"}
_COLOURS = {name: f"#0000{number:02x}" for number, name in enumerate(_VARIABLES, start=1)}
_DASHES = ("", "7 4", "2 4", "9 3 2 3", "4 2", "12 5")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a folder may have dollars in its name
    "font.size": 12.5,
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["soft"],
    "axes.labelpad": 6,
    "axes.facecolor": "none",
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}.labelcolor": _COLOURS["soft"] for axis in ("xtick", "ytick")},
    "xtick.bottom": False,
    "ytick.left": False,
    "grid.color": _COLOURS["grid"],
    "lines.scale_dashes": False,
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "round",
}

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """`style` is the class of its colour: `c0`, `c1`, ... or, for what others are compared with, `base`."""

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
    chart = _Chart(title, HEIGHT)
    with chart.axes(x_label, y_label) as axes:
        _set_ticks(axes.yaxis, write)
        axes.set_xticks(range(len(categories)), [visible(category) for category in categories])
        axes.set_xlim(-0.5, max(len(categories), 1) - 0.5)
        width = min(0.78 / max(len(bars), 1), 0.11 * max(len(categories), 1))
        room = width * 0.85 * WIDTH / max(len(categories), 1)
        for row, (series, values) in enumerate(bars):
            middles = [index + (row - (len(bars) - 1) / 2) * width for index in range(len(values))]
            drawn = axes.bar(middles, values, width * 0.95, color=_COLOURS[series.style])
            said = [write(value) for value in values]
            for bar, category, text in zip(drawn, categories, said, strict=False):
                chart.say(bar, f"{series.name}, {category}: {text}")
            fitting = [text if room >= _CHARACTER * len(text) else "" for text in said]
            axes.bar_label(drawn, fitting, padding=3, size=11.5, weight="bold")
        if reference is not None:
            axes.axhline(reference, **_reference_line())
        if max([reference or 0.0, *(value for _, values in bars for value in values)]) <= 0:
            axes.set_ylim(0, 1)  # nothing but zeros has no scale of its own
    return chart.svg()


def range_chart(
    rows: Sequence[RangeRow], *, title: str, x_label: str, write: Format, reference: float, reference_label: str
) -> str:
    """A row for each series: a dot with its interval, a hollow diamond for the prediction, a line at `reference`."""
    row_height = max(46.0, min(72.0, 200 / max(len(rows), 1)))
    chart = _Chart(title, row_height * len(rows) + 72)
    with chart.axes(x_label, grid="x") as axes:
        _set_ticks(axes.xaxis, write)
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.axvline(reference, **_reference_line())
        for index, row in enumerate(rows):
            _draw_range(chart, axes, row, index, write)
        low, high = axes.get_xlim()
        side = "left" if reference < (low + high) / 2 else "right"
        above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (0, 5), "textcoords": "offset points"}
        axes.annotate(visible(reference_label), (reference, 1), ha=side, color=_COLOURS["soft"], **above)
    return chart.svg()


def _draw_range(chart: _Chart, axes: Axes, row: RangeRow, index: int, write: Format) -> None:
    colour, y = _COLOURS[row.series.style], index + 0.2
    said = shown = f"{write(row.value)} ({write(row.low)} to {write(row.high)})"
    marks: list[Artist] = [*axes.plot([row.low, row.high], [y, y], color=colour, linewidth=5, alpha=0.45)]
    if row.predicted is not None:
        predicted = f", predicted {write(row.predicted)}"
        said, shown = said + predicted, write(row.value) + predicted
        hollow: dict[str, Any] = {"color": _COLOURS["card"], "edgecolors": colour, "linewidths": 2}
        marks.append(axes.scatter(row.predicted, y, 90, marker="D", zorder=3, **hollow))
    marks.append(axes.scatter(row.value, y, 110, colour, linewidths=0, zorder=4))
    for mark in marks:
        chart.say(mark, f"{row.series.name}: {said}")
    # The end of a long name is what tells it from others.
    room = int((WIDTH - 44 - _CHARACTER * len(shown)) / (_CHARACTER + 1))
    name = row.series.name if len(row.series.name) <= room else "…" + row.series.name[1 - room :]
    text: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "weight": "bold"}
    axes.annotate(visible(name), (0.01, index - 0.2), ha="left", size=13.5, **text)
    axes.annotate(shown, (1, index - 0.2), ha="right", size=11.5, **text)


def line_chart(
    lines: Sequence[tuple[Series, Sequence[tuple[int, float]]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    dots: bool = False,
) -> str:
    """Values over steps; empty where there are none. A line of very many points shows averages of neighbours."""
    drawn = [(series, _thinned(points)) for series, points in lines if points]
    if not drawn:
        return ""
    chart = _Chart(title, HEIGHT)
    with chart.axes(x_label, y_label) as axes:
        _set_ticks(axes.xaxis, short, whole=True)
        _set_ticks(axes.yaxis, short)
        for index, (series, points) in enumerate(drawn):
            colour, dashes = _COLOURS[series.style], _DASHES[index % NUM_COLOURS]
            style = (0, tuple(map(float, dashes.split()))) if dashes else "-"
            (line,) = axes.plot(*zip(*points, strict=True), color=colour, linewidth=2, linestyle=style)
            said = [f"{series.name}: {short(value)} at {short(step)}" for step, value in points]
            chart.say(line, said[-1])
            for (step, value), words in list(zip(points, said, strict=True))[0 if dots else -1 :]:
                chart.say(axes.scatter(step, value, 30, colour, linewidths=0, zorder=3), words)
        steps = [step for _, points in drawn for step, _ in points]
        axes.set_xlim(min(steps), max(*steps, min(steps) + 1))
        if from_zero:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return chart.svg()


def scatter_chart(
    points: Sequence[tuple[Series, float, float]],
    paths: Sequence[tuple[Series, Sequence[tuple[float, float]]]] = (),
    *,
    title: str,
    x_label: str,
    y_label: str,
    write: Format,
    reference: float,
    reference_label: str,
) -> str:
    """Named points, thin lines through what was tried beside them, and a dashed line at `reference` of the x axis.

    The x axis is linear up to twice `reference` on either side of 0 and logarithmic beyond: what lies far beyond the
    reference is shown, and leaves the room to what is near it.
    """
    chart = _Chart(title, HEIGHT)
    with chart.axes(x_label, y_label) as axes:
        axes.set_xscale("symlog", linthresh=2 * reference)
        axes.xaxis.set_major_locator(FixedLocator([reference * by for by in _SYMMETRIC_TICKS]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
        _set_ticks(axes.yaxis, short)
        for series, path in paths:
            if path:
                axes.plot(*zip(*path, strict=True), color=_COLOURS[series.style], linewidth=1.2, alpha=0.5)
        for series, x, y in points:
            mark = axes.scatter(x, y, 70, _COLOURS[series.style], linewidths=0, zorder=3)
            chart.say(mark, f"{series.name}: {short(y)} at {write(x)}")
            axes.annotate(visible(series.name), (x, y), xytext=(6, 4), textcoords="offset points", size=11)
        axes.axvline(reference, **_reference_line())
        above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (0, 5), "textcoords": "offset points"}
        axes.annotate(visible(reference_label), (reference, 1), ha="center", color=_COLOURS["soft"], **above)
        axes.margins(0.12)
    return chart.svg()


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _MAX_POINTS)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in chunk) / len(chunk), sum(v for _, v in chunk) / len(chunk)) for chunk in chunks]


def legend(series: Sequence[Series], *, dashed: bool = False) -> str:
    """The names of the series, as HTML that wraps on a phone; `dashed` for those of a line chart."""
    items = []
    for index, one in enumerate(series):
        mark = f'<i class="swatch {one.style}"></i>'
        if dashed:
            line = f'<line stroke-dasharray="{_DASHES[index % NUM_COLOURS]}" x1="1" x2="25" y1="5" y2="5"/>'
            size = 'viewBox="0 0 26 10" width="26" height="10"'
            mark = f'<svg class="{one.style}" {size} aria-hidden="true">{line}</svg>'
        items.append(f"<li>{mark}{escape(visible(one.name))}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


class _Chart:
    """A figure whose marks can say something, and its way into a page."""

    def __init__(self, title: str, height: float) -> None:
        self._title, self._height = title, height
        self._figure = Figure((WIDTH / 72, height / 72), layout="constrained")  # 72 of matplotlib's points are an inch
        self._said: dict[str, str] = {}
        self._drawn = io.BytesIO()

    @contextmanager
    def axes(self, x_label: str, y_label: str = "", *, grid: Literal["x", "y"] = "y") -> Iterator[Axes]:
        with matplotlib.rc_context(_STYLE):
            axes = self._figure.add_subplot(xlabel=visible(x_label), ylabel=visible(y_label))
            axes.grid(axis=grid)
            axes.set_axisbelow(True)
            yield axes
            with warnings.catch_warnings():
                # The page has a font for every script; matplotlib's, of which it only takes the widths, has not.
                warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
                self._figure.savefig(self._drawn, format="svg", transparent=True, metadata={"Date": None})

    def say(self, mark: Artist, text: str) -> None:
        """Let the browser show `text` where the pointer rests on `mark`."""
        name = f"said{len(self._said)}"
        mark.set_gid(name)
        self._said[name] = visible(text)

    def svg(self) -> str:
        root = ET.fromstring(self._drawn.getvalue())
        shapes = {path.get("id"): path.get("d", "") for path in root.iter(_SVG + "path")}
        box = f"0 0 {WIDTH} {self._height:.0f}"
        svg = ET.Element("svg", {"class": "chart", "viewBox": box, "role": "img", "aria-label": visible(self._title)})
        svg.extend(child for element in root for child in self._for_a_page(element, shapes))
        return ET.tostring(svg, encoding="unicode")

    def _for_a_page(self, element: ET.Element, shapes: dict[str | None, str]) -> list[ET.Element]:
        """The element as a page needs it: without ids, styles and clips, which would meet those of other charts there.

        A group that says nothing makes room for its children, and numbers lose what is less than a pixel.
        """
        tag, values = element.tag.removeprefix(_SVG), element.attrib
        if tag in ("defs", "metadata"):
            return []
        style = re.sub(r"font-family: [^;]*;?", "", values.get("style", ""))
        for name, colour in _COLOURS.items():
            style = style.replace(colour, _VARIABLES[name])
        kept: dict[str, str] = {name: _tenths(values[name]) for name in ("d", "x", "y", "transform") if name in values}
        if tag == "use":  # a mark whose shape stands elsewhere
            shape = _tenths(shapes[values[_LINK].removeprefix("#")])
            tag, kept = "path", {"d": shape, "transform": f"translate({kept['x']} {kept['y']})"}
        result = ET.Element(tag, {**kept, **({"style": style} if style else {})})
        if tag == "text":
            result.text = element.text
        said = self._said.get(values.get("id", ""))
        if said is not None:
            ET.SubElement(result, "title").text = said
        result.extend(child for below in element for child in self._for_a_page(below, shapes))
        return list(result) if tag == "g" and said is None else [result]


def _tenths(numbers: str) -> str:
    rounded = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", numbers)
    return " ".join(rounded.split())


def _set_ticks(axis: Axis, write: Format, *, whole: bool = False) -> None:
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=whole))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def _reference_line() -> dict[str, Any]:
    return {"color": _COLOURS["soft"], "linewidth": 1.2, "linestyle": (0, (3.0, 3.0))}
