"""How a report writes numbers, and text that models and files bring."""

from __future__ import annotations

NONE = "–"

# Not a character of a document, or one that turns the text around it: shown as a picture, or as its number.
_DIRECTION = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in (*_DIRECTION, 0xFFFE, 0xFFFF)},
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),  # half of a character, which UTF-8 cannot hold
}


def visible(text: str) -> str:
    """The text with control characters as visible ones, and nothing that UTF-8 cannot hold."""
    return text.translate(_SHOWN)


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
