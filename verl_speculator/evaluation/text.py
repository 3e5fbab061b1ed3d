"""Text of models and files, made fit to be shown."""

from __future__ import annotations

# Not a character of a document, or one that turns the text around it: shown as a picture, or as its number.
_DIRECTION = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in (*_DIRECTION, 0xFFFE, 0xFFFF)},
    **dict.fromkeys(range(55296, 57344), "�"),  # half of a character, which UTF-8 cannot hold
}


def visible(text: str) -> str:
    """The text with control characters as visible ones, and nothing that UTF-8 cannot hold."""
    return text.translate(_SHOWN)
