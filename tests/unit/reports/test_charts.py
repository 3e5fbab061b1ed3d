"""Charts are read back as XML and their marks measured."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from verl_speculator.reports.charts import (
    HEIGHT,
    WIDTH,
    RangeRow,
    Series,
    bar_chart,
    legend,
    line_chart,
    range_chart,
    series_style,
)

NASTY = "</script><b>\"'& $x^{ %s\x00"


def marks(svg: str, title: str) -> list[ET.Element]:
    """The shapes that say `title` on hovering."""
    groups = [group for group in ET.fromstring(svg).iter("g") if group.findtext("title") == title]
    return [path for group in groups for path in group.iter("path")]


def titles(svg: str) -> list[str | None]:
    return [title.text for title in ET.fromstring(svg).iter("title")]


def texts(svg: str) -> list[str | None]:
    return [text.text for text in ET.fromstring(svg).iter("text")]


def points(path: ET.Element) -> list[tuple[float, float]]:
    """The corners of a path, where it really is."""
    moved = re.match(r"translate\((\S+) (\S+)\)", path.get("transform", ""))
    right, down = map(float, moved.groups()) if moved else (0.0, 0.0)
    numbers = list(map(float, re.findall(r"-?[\d.]+", path.get("d", ""))))
    return [(x + right, y + down) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def extent(path: ET.Element) -> tuple[float, float, float, float]:
    xs, ys = zip(*points(path), strict=True)
    return min(xs), max(xs), min(ys), max(ys)


def centre(path: ET.Element) -> tuple[float, float]:
    left, right, top, bottom = extent(path)
    return (left + right) / 2, (top + bottom) / 2


def dashed(svg: str) -> list[ET.Element]:
    return [path for path in ET.fromstring(svg).iter("path") if "stroke-dasharray" in path.get("style", "")]


def tick(svg: str, label: str, axis: str) -> float:
    """Where a label of an axis stands."""
    (text,) = (text for text in ET.fromstring(svg).iter("text") if text.text == label)
    return float(text.get(axis))


def percent(value: float) -> str:
    return f"{value:.0%}"


def chart_of(values: list[float], **options) -> str:
    return bar_chart(
        [str(index) for index in range(len(values))], [(Series("a", "c0"), values)],
        title="t", x_label="x", y_label="y", write=lambda value: f"{value:g}", **options,
    )  # fmt: skip


def test_bar_heights_are_proportional() -> None:
    svg = bar_chart(
        ["1", "2"], [(Series("a", "c0"), [1.0, 0.5]), (Series("b", "c1"), [0.25])],
        title="t", x_label="x", y_label="y", write=percent,
    )  # fmt: skip
    assert sorted(titles(svg)) == ["a, 1: 100%", "a, 2: 50%", "b, 1: 25%"]
    high, half, quarter = (extent(*marks(svg, title)) for title in sorted(titles(svg)))
    heights = [bottom - top for _, _, top, bottom in (high, half, quarter)]
    assert heights == pytest.approx([heights[0], heights[0] / 2, heights[0] / 4], abs=0.2)
    assert high[1] < quarter[0] < half[0], "bars of a group stand side by side, before those of the next"


def test_series_have_the_pages_colours() -> None:
    svg = bar_chart(
        ["1"], [(Series("a", "c0"), [1.0]), (Series("b", "base"), [1.0])],
        title="t", x_label="x", y_label="y", write=percent,
    )  # fmt: skip
    assert "fill: var(--s0)" in marks(svg, "a, 1: 100%")[0].get("style")
    assert "fill: var(--sbase)" in marks(svg, "b, 1: 100%")[0].get("style")
    assert "#" not in svg, "a colour of matplotlib's own would be wrong in one of light and dark"


def test_axis_is_named() -> None:
    svg = bar_chart(["1"], [(Series("a", "c0"), [1.0])], title="t", x_label="down", y_label="up", write=percent)
    assert {"down", "up", "0%", "100%"} <= set(texts(svg))
    assert tick(svg, "0%", "y") > tick(svg, "20%", "y")


def test_bars_are_compared_with_a_line() -> None:
    svg = chart_of([1.0, 4.0], reference=2.0)
    (line,) = dashed(svg)
    _, _, zero, _ = extent(*marks(svg, "a, 0: 1"))
    bottom = extent(*marks(svg, "a, 0: 1"))[3]
    assert bottom - centre(line)[1] == pytest.approx(2 * (bottom - zero), abs=0.3)


def test_values_without_room_are_only_said_on_hovering() -> None:
    many = [(Series(f"s{index}", series_style(index)), [0.123456] * 8) for index in range(6)]
    svg = bar_chart(list("abcdefgh"), many, title="t", x_label="x", y_label="y", write=str)
    assert "0.123456" not in texts(svg)
    assert len(titles(svg)) == 48


def test_range_chart_places_dot_interval_and_prediction() -> None:
    row = RangeRow(Series("a", "c0"), value=2.0, low=1.0, high=3.0, predicted=2.5)
    svg = range_chart([row], title="t", x_label="x", write=str, reference=1.0, reference_label="none")
    said = "a: 2.0 (1.0 to 3.0), predicted 2.5"
    bar, diamond, dot = marks(svg, said)
    left, right, _, _ = extent(bar)
    assert centre(dot)[0] == pytest.approx((left + right) / 2, abs=0.2)
    assert centre(diamond)[0] == pytest.approx(left + 0.75 * (right - left), abs=0.2)
    assert centre(dot)[1] == pytest.approx(centre(bar)[1], abs=0.2)
    (reference,) = dashed(svg)
    assert centre(reference)[0] == pytest.approx(left, abs=0.2)
    assert {"none", "a", "2.0, predicted 2.5"} <= set(texts(svg))


def test_long_names_are_cut_at_their_beginning() -> None:
    rows = [RangeRow(Series(f"{'folder/' * 20}run {index}", "c0"), 2.0, 1.0, 3.0) for index in range(2)]
    svg = range_chart(rows, title="t", x_label="x", write=str, reference=1.0, reference_label="none")
    names = [text for text in texts(svg) if "run" in text]
    assert all(len(name) < 40 and name.startswith("…") for name in names)
    assert [name[-5:] for name in names] == ["run 0", "run 1"]


def test_line_goes_through_its_points() -> None:
    svg = line_chart([(Series("a", "c0"), [(0, 0.0), (5, 1.0), (10, 4.0)])], title="t", x_label="x", y_label="y")
    line, dot = marks(svg, "a: 4 at 10")
    first, middle, last = points(line)
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.2)
    assert first[1] - middle[1] == pytest.approx((first[1] - last[1]) / 4, abs=0.2)
    assert centre(dot) == pytest.approx(last, abs=0.2)
    assert tick(svg, "10", "x") == pytest.approx(last[0], abs=0.2)


def test_every_point_of_a_short_line_can_be_asked() -> None:
    lines = [(Series("a", "c0"), [(1, 1.0), (2, 3.0)])]
    svg = line_chart(lines, title="t", x_label="x", y_label="y", dots=True)
    assert titles(svg) == ["a: 3 at 2", "a: 1 at 1", "a: 3 at 2"]


def test_lines_differ_in_their_dashes_as_the_legend_says() -> None:
    series = [Series(name, series_style(index)) for index, name in enumerate("abc")]
    svg = line_chart([(one, [(0, 1.0), (9, 2.0)]) for one in series], title="t", x_label="x", y_label="y")
    drawn = [re.search("stroke-dasharray: ([^;]*)", path.get("style")).group(1) for path in dashed(svg)]
    named = [line.get("stroke-dasharray") for line in ET.fromstring(legend(series, dashed=True)).iter("line")]
    assert [dashes.replace(",", " ") for dashes in drawn] == [dashes for dashes in named if dashes] == ["7 4", "2 4"]


def test_long_line_is_thinned_to_averages() -> None:
    values = [(step, float(step % 2)) for step in range(2000)]
    svg = line_chart([(Series("a", "c0"), values)], title="t", x_label="x", y_label="y")
    line, _ = marks(svg, titles(svg)[0])
    assert 100 < len(points(line)) <= 240


def test_chart_without_points_is_left_out() -> None:
    assert line_chart([(Series("a", "c0"), [])], title="t", x_label="x", y_label="y") == ""


NASTY_CHARTS = {
    "bars": bar_chart(
        [NASTY], [(Series(NASTY, "c0"), [1.0])], title=NASTY, x_label=NASTY, y_label=NASTY, write=percent
    ),
    "no bars": bar_chart([], [], title="", x_label="", y_label="", write=percent),
    "zeros": bar_chart(["1"], [(Series("a", "c0"), [0.0])], title="", x_label="", y_label="", write=percent),
    "high line": bar_chart(
        ["1"], [(Series("a", "c0"), [0.0])], title="", x_label="", y_label="", write=percent, reference=3.0
    ),
    "range": range_chart(
        [RangeRow(Series(NASTY, "c0"), 1.0, 1.0, 1.0)],
        title=NASTY, x_label=NASTY, write=str, reference=1.0, reference_label=NASTY,
    ),
    "one point": line_chart([(Series(NASTY, "c0"), [(3, 7.0)])], title=NASTY, x_label=NASTY, y_label=NASTY),
    "dashed legend": legend([Series(NASTY, "c0")], dashed=True),
    "legend": legend([Series(NASTY, "c0")]),
}  # fmt: skip


@pytest.mark.parametrize("svg", NASTY_CHARTS.values(), ids=NASTY_CHARTS.keys())
def test_is_well_formed_and_inside_its_box(svg) -> None:
    root = ET.fromstring(svg)
    for path in root.iter("path"):
        left, right, top, bottom = extent(path)
        assert 0 <= left <= right <= WIDTH
        assert 0 <= top <= bottom <= HEIGHT
    for text in root.iter("text"):
        assert 0 <= float(text.get("x")) <= WIDTH
        assert 0 <= float(text.get("y")) <= HEIGHT
    if "folder" not in svg and "<text" in svg and NASTY[:5] in "".join(root.itertext()):
        assert NASTY.replace("\x00", "␀") in texts(svg)


@pytest.mark.parametrize("svg", NASTY_CHARTS.values(), ids=NASTY_CHARTS.keys())
def test_nothing_of_it_reaches_beyond_it(svg) -> None:
    """Ids, styles and links of one chart would meet those of another on the same page."""
    for element in ET.fromstring(svg).iter():
        assert element.tag not in ("defs", "style", "metadata", "use", "clipPath")
        assert not {"id", "clip-path", "href"} & set(element.attrib)
    assert "url(" not in svg


def test_the_same_values_give_the_same_picture() -> None:
    assert chart_of([1.0, 2.0]) == chart_of([1.0, 2.0])


def test_series_styles_repeat() -> None:
    assert [series_style(index) for index in (0, 5, 6)] == ["c0", "c5", "c0"]


@pytest.mark.parametrize(
    ("highest", "labels"),
    [
        (1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (0.83, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (4.2, ["0", "1", "2", "3", "4", "5"]),
        (0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (0.0009, ["0", "0.0002", "0.0004", "0.0006", "0.0008", "0.001"]),
    ],
)
def test_ticks_are_round_and_enclose(highest, labels) -> None:
    ticks = [text for text in texts(chart_of([highest, 0.0])) if text not in ("x", "y")]
    # After the two categories come the axis' labels, then those of the bars.
    assert ticks[2 : 2 + len(labels)] == labels
    assert len(ticks) == 2 + len(labels) + 2


@pytest.mark.parametrize(
    ("steps", "labels"), [((1, 3), ["1", "2", "3"]), ((5, 5), ["5", "6"]), ((0, 160), ["0", "50", "100", "150"])]
)
def test_step_ticks_are_whole(steps, labels) -> None:
    svg = line_chart([(Series("a", "c0"), [(step, 0.5) for step in steps])], title="t", x_label="steps", y_label="y")
    assert texts(svg)[: texts(svg).index("steps")] == labels
