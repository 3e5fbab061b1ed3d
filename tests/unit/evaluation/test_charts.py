"""Charts are read back as XML and their marks measured."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from verl_speculator.evaluation.charts import (
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
from verl_speculator.evaluation.scale import Scale, nice_ticks, short, whole_ticks

NASTY = "</script><b>\"'&\x00"


def marks(svg: str, tag: str, style: str = "") -> list[ET.Element]:
    return [e for e in ET.fromstring(svg).iter(tag) if style in e.get("class", "").split() or not style]


def percent(value: float) -> str:
    return f"{value:.0%}"


def test_bar_heights_are_proportional() -> None:
    svg = bar_chart(
        ["1", "2"], [(Series("a", "c0"), [1.0, 0.5]), (Series("b", "c1"), [0.25])],
        title="t", x_label="x", y_label="y", write=percent,
    )  # fmt: skip
    heights = [float(bar.get("height")) for bar in marks(svg, "rect", "c0")]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    (other,) = marks(svg, "rect", "c1")
    assert float(other.get("height")) == pytest.approx(heights[0] / 4, abs=0.2)
    assert [title.text for title in marks(svg, "title")] == ["a, 1: 100%", "b, 1: 25%", "a, 2: 50%"]


def test_axis_is_named() -> None:
    svg = bar_chart(["1"], [(Series("a", "c0"), [1.0])], title="t", x_label="down", y_label="up", write=percent)
    assert {"down", "up", "0%", "100%"} <= {text.text for text in marks(svg, "text")}


def test_range_chart_places_dot_interval_and_prediction() -> None:
    row = RangeRow(Series("a", "c0"), value=2.0, low=1.0, high=3.0, predicted=2.5)
    svg = range_chart([row], title="t", x_label="x", write=str, reference=1.0, reference_label="none")
    (dot,), (bar,) = marks(svg, "circle"), marks(svg, "line", "thick")
    assert float(dot.get("cx")) == pytest.approx((float(bar.get("x1")) + float(bar.get("x2"))) / 2, abs=0.1)
    (reference,) = marks(svg, "line", "reference")
    assert float(reference.get("x1")) == pytest.approx(float(bar.get("x1")), abs=0.1)
    assert "2.0 (1.0 to 3.0), predicted 2.5" in marks(svg, "title")[0].text


def test_line_goes_through_its_points() -> None:
    svg = line_chart([(Series("a", "c0"), [(0, 0.0), (5, 1.0), (10, 2.0)])], title="t", x_label="x", y_label="y")
    (line,) = marks(svg, "polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert points[1] == pytest.approx(tuple((a + b) / 2 for a, b in zip(points[0], points[2], strict=True)), abs=0.1)
    assert points[0][1] > points[2][1]  # up is small in SVG


def test_long_line_is_thinned_to_averages() -> None:
    points = [(step, float(step % 2)) for step in range(2000)]
    svg = line_chart([(Series("a", "c0"), points)], title="t", x_label="x", y_label="y")
    (line,) = marks(svg, "polyline")
    assert 100 < len(line.get("points").split()) <= 240


def test_chart_without_points_is_left_out() -> None:
    assert line_chart([(Series("a", "c0"), [])], title="t", x_label="x", y_label="y") == ""


@pytest.mark.parametrize(
    "svg",
    [
        bar_chart([NASTY], [(Series(NASTY, "c0"), [1.0])], title=NASTY, x_label=NASTY, y_label=NASTY, write=percent),
        bar_chart([], [], title="", x_label="", y_label="", write=percent),
        bar_chart(["1"], [(Series("a", "c0"), [0.0])], title="", x_label="", y_label="", write=percent, reference=3.0),
        range_chart(
            [RangeRow(Series(NASTY, "c0"), 1.0, 1.0, 1.0)],
            title=NASTY, x_label=NASTY, write=str, reference=1.0, reference_label=NASTY,
        ),
        line_chart([(Series(NASTY, "c0"), [(3, 7.0)])], title=NASTY, x_label=NASTY, y_label=NASTY),
        legend([Series(NASTY, "c0")], dashed=True),
        legend([Series(NASTY, "c0")]),
    ],
)  # fmt: skip
def test_is_well_formed_and_inside_its_box(svg) -> None:
    root = ET.fromstring(svg)
    for element in root.iter():
        for name, limit in (("x", WIDTH), ("cx", WIDTH), ("y", HEIGHT), ("cy", HEIGHT)):
            assert 0 <= float(element.get(name, 0)) <= limit


def test_series_styles_repeat() -> None:
    assert [series_style(index) for index in (0, 5, 6)] == ["c0", "c5", "c0"]


def test_scale_maps_ends_to_ends() -> None:
    scale = Scale(1, 3, 100, 0)
    assert (scale(1), scale(2), scale(3)) == (100, 50, 0)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0.83, [0, 0.25, 0.5, 0.75, 1]),
        (1, 4.2, [1, 2, 3, 4, 5]),
        (0, 0, [-0.5, -0.25, 0, 0.25, 0.5]),
        (2, 2, [0, 0.5, 1, 1.5, 2]),
        (-3, 5, [-4, -2, 0, 2, 4, 6]),
        (0.0001, 0.0009, [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, ticks) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_step_ticks_are_whole() -> None:
    assert whole_ticks(1, 3) == [1, 2, 3]
    assert whole_ticks(5, 5) == [5]
    assert whole_ticks(0, 160) == [0, 50, 100, 150]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.0, "1"), (0.25, "0.25"), (123.4, "123"), (1234, "1,234"), (12345, "12.3k"), (2.5e6, "2.5M"),
     (0.00003, "3e-5"), (-0.5, "-0.5")],
)  # fmt: skip
def test_short_numbers(value, text) -> None:
    assert short(value) == text
