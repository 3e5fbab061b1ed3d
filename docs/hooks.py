"""What `make docs` adds to the pages of this folder: the README as the first one, and a reference of the settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SETTINGS = ROOT / "configs" / "speculator_sft.yaml"
_KEY = re.compile(r"( *)(\w+):(?: +(.*))?")


class Setting(NamedTuple):
    key: str
    default: str
    meaning: str


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, text in (("index.md", first_page()), ("configuration.md", configuration_page())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../README.md)", "](index.md)")


def first_page() -> str:
    """The README with links to pages; those to files of the repository, which a site does not have, lose their link."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.replace(f"]({SETTINGS.relative_to(ROOT)})", "](configuration.md)").replace("](docs/", "](")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", _page_link, text)


def _page_link(link: re.Match[str]) -> str:
    is_page = (ROOT / "docs" / link[2]).is_file() or link[2] == "configuration.md"
    return link[0] if is_page else link[1]


def configuration_page() -> str:
    rows = [f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in read_settings(SETTINGS.read_text())]
    return "\n".join(
        [
            "# Settings",
            "",
            "Every key that this package adds to verl's `sft_trainer_engine`, or gives another default:",
            "`verl-speculator train key=value`.",
            "",
            "| key | default | meaning |",
            "| --- | --- | --- |",
            *(row.replace("\n", " ") for row in rows),
            "",
        ]
    )


def read_settings(text: str) -> Iterator[Setting]:
    """Each key of a commented configuration; a comment holds for all keys below it, up to an empty line."""
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.partition("\ndefaults:")[2].splitlines():
        if not line.strip():
            comment = []
        elif line.lstrip().startswith("#"):
            comment.append(line.strip("# "))
        elif found := _KEY.fullmatch(line.partition("  #")[0].rstrip()):
            indent, key, value = len(found[1]), found[2], found[3]
            path = [*(part for part in path if part[0] < indent), (indent, key)]
            if value is None:
                comment = []
            elif not key.startswith("_"):  # Hydra's own
                yield Setting(".".join(part for _, part in path), value, " ".join(comment).replace("|", "\\|"))
