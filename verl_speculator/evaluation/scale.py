"""Axes: where the ticks go and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A straight map from values `low..high` to pixels `start..end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2, 2.5 or 5 times a power of ten that enclose `low..high`."""
    if not high > low:
        low, high = (low - 0.5, high + 0.5) if low == 0 else (min(low, 0.0), max(high, 0.0))
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def whole_ticks(low: int, high: int, count: int = 6) -> list[float]:
    """As `nice_ticks`, of integers inside `low..high`."""
    ticks = [tick for tick in nice_ticks(low, high, count) if low <= tick <= high and tick == int(tick)]
    return ticks or [float(low)]


def short(value: float) -> str:
    """A number in few characters: 0.001, 2.5, 1.2k, 3e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.2g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:.3g}"


def tick_labels(ticks: Sequence[float]) -> list[str]:
    return [short(tick) for tick in ticks]
