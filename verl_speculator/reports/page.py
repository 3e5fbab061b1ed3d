"""Pages that need nothing but themselves: templates, their style inside, and how they are written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from verl_speculator.reports.writing import visible

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Tile:
    """A number in large type, and what it is; `state` is "good", "bad" or nothing."""

    what: str
    number: str
    more: str
    unit: str = ""
    is_word: bool = False
    state: str = ""


def render(template: str, **values: Any) -> str:
    """The page, in characters that a document can hold.

    Everything but `Markup` is escaped, and a name that a template does not get is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return visible(environment.get_template(template).render(style=style, **values))


def write_file(file: Path, text: str) -> None:
    """The whole file or, where writing is cut off, the one that was there before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
