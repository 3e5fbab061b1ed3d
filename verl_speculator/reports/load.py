"""The report of a load test: `load.json` for programs, `index.html` for people, a table for the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from verl_speculator.evaluation.load_results import LoadResult
from verl_speculator.reports.charts import Series, bar_chart, legend, series_style
from verl_speculator.reports.page import render, write_file
from verl_speculator.reports.writing import fixed, plural

JSON_FILE, PAGE_FILE = "load.json", "index.html"
COLUMNS = (
    "requests at a time",
    "served with",
    "tokens/s",
    "first token, ms: p50",
    "p99",
    "between tokens, ms: p50",
    "p99",
    "acceptance length",
)


def rows(results: Sequence[LoadResult]) -> list[list[str]]:
    """The table's cells, by number of requests."""
    return [
        [
            *(str(one.concurrency), one.name, fixed(one.tokens_per_second, 1)),
            *(fixed(value, 1) for value in (one.ttft_p50, one.ttft_p99, one.tpot_p50, one.tpot_p99)),
            fixed(one.acceptance_length),
        ]
        for one in sorted(results, key=lambda one: one.concurrency)
    ]


def format_rows(results: Sequence[LoadResult]) -> str:
    lines = [list(COLUMNS), *rows(results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def write_load_report(results: Sequence[LoadResult], settings: dict[str, Any], folder: Path) -> None:
    """Write both files into `folder`, each whole or not at all."""
    contents = {"settings": settings, "results": [dataclasses.asdict(one) for one in results]}
    write_file(folder / JSON_FILE, json.dumps(contents, indent=2, allow_nan=False) + "\n")
    write_file(folder / PAGE_FILE, render_page(results, settings))


def render_page(results: Sequence[LoadResult], settings: dict[str, Any]) -> str:
    levels = sorted({one.concurrency for one in results})
    names = list(dict.fromkeys(one.name for one in results))
    series = [Series(name, series_style(index)) for index, name in enumerate(names)]

    def chart(title: str, label: str, field: str) -> Markup:
        found = {(one.name, one.concurrency): getattr(one, field) for one in results}
        bars = [(one, [found[one.name, level] for level in levels]) for one in series]
        return Markup(
            bar_chart(
                [str(level) for level in levels],
                bars,
                title=title,
                x_label="requests at a time",
                y_label=label,
                write=lambda value: fixed(value, 1),
            )
        )

    return render(
        "load.html.jinja",
        title=f"Load test: {settings['base']}",
        subtitle=f"{plural(settings['requests'], 'request')} of up to {settings['max_tokens']} tokens each, sent by "
        "vLLM's own client",
        columns=COLUMNS,
        rows=rows(results),
        legend=Markup(legend(series)),
        throughput=chart("Tokens a second", "tokens/s", "tokens_per_second"),
        between=chart("Between tokens, half of the requests", "ms", "tpot_p50"),
        settings=settings,
    )
