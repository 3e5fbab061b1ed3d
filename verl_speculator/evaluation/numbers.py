"""How a report writes its numbers."""

from __future__ import annotations

NONE = "–"


def fixed(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def percent(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def between(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def count(value: int) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,}"


def plural(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
