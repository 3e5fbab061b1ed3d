"""The result as a table for a terminal, as wide as that is."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from verl_speculator.evaluation.numbers import count, fixed, percent
from verl_speculator.evaluation.results import EvaluationResult
from verl_speculator.evaluation.rows import Row, comparison_rows, drafters
from verl_speculator.evaluation.text import visible

_GAP = "  "
_MAX_COLUMN = 28


def format_table(result: EvaluationResult, width: int) -> str:
    """Every line has at most `width` characters; where not all drafters fit side by side there is a block for some."""
    rows = comparison_rows(result)
    labels = [visible(drafter.label) for drafter in drafters(result)]
    name_width = min(max(len(row.name) for row in rows), max(width // 3, 8))
    blocks, start = [], 0
    while start < len(labels):
        end = start + 1
        while end < len(labels) and _block_width(rows, labels, range(start, end + 1), name_width) <= width:
            end += 1
        blocks.append(_block(rows, labels, range(start, end), name_width, width))
        start = end
    return "\n\n".join([*blocks, textwrap.fill(_target_line(result), width)])


def _target_line(result: EvaluationResult) -> str:
    target = result.target
    loss = (
        "no reference answers"
        if target.held_out_loss is None
        else f"{fixed(target.held_out_loss, 3)} nats a token on the reference answers"
    )
    return (
        f"target: {loss}; {percent(target.repeated_4grams, 1)} of the 4-grams it generates are repeats; "
        f"{count(result.num_prompts)} prompts, {count(target.num_tokens)} tokens, "
        f"{result.settings['dtype']} on {result.settings['device']}"
    )


def _cell_texts(rows: Sequence[Row], column: int) -> list[str]:
    return [_joined(row, column) for row in rows]


def _joined(row: Row, column: int) -> str:
    cell = row.cells[column]
    return f"{cell.text} ({cell.more})" if cell.more else cell.text


def _column_width(rows: Sequence[Row], labels: Sequence[str], column: int) -> int:
    return max(*map(len, _cell_texts(rows, column)), min(len(labels[column]), _MAX_COLUMN))


def _block_width(rows: Sequence[Row], labels: Sequence[str], columns: range, name_width: int) -> int:
    return name_width + sum(len(_GAP) + _column_width(rows, labels, column) for column in columns)


def _block(rows: Sequence[Row], labels: Sequence[str], columns: range, name_width: int, width: int) -> str:
    widths = [_column_width(rows, labels, column) for column in columns]
    # A single column that is too wide even alone gives up what stands in parentheses.
    room = width - name_width - len(_GAP)
    narrow = len(widths) == 1 and widths[0] > room
    widths = [max(room, 1)] if narrow else widths
    heads = [_end(labels[column], size) for column, size in zip(columns, widths, strict=True)]
    lines = [_line("", heads, name_width, widths)]
    lines.append("─" * min(len(lines[0]), width))
    for row in rows:
        cells = [row.cells[column].text if narrow else _joined(row, column) for column in columns]
        lines.append(
            _line(row.name, [cell[:size] for cell, size in zip(cells, widths, strict=True)], name_width, widths)
        )
    return "\n".join(line.rstrip() for line in lines)


def _line(name: str, cells: Sequence[str], name_width: int, widths: Sequence[int]) -> str:
    padded = (cell.rjust(size) for cell, size in zip(cells, widths, strict=True))
    return _GAP.join([_start(name, name_width).ljust(name_width), *padded])


def _start(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _end(text: str, width: int) -> str:
    """Of a folder, the end says more than the beginning."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]
