"""All measures of all drafters side by side: the rows that the page shows, and the terminal's table of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verl_speculator.evaluation.results import DrafterResult, EvaluationResult
from verl_speculator.reports.writing import NONE, between, count, fixed, milliseconds, percent, times, visible

if TYPE_CHECKING:
    from verl_speculator.decoding import Interval

_GAP = "  "
_MAX_COLUMN = 28


@dataclass(frozen=True)
class Cell:
    text: str
    more: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.more})" if self.more else self.text


@dataclass(frozen=True)
class Row:
    """A measure, and what each drafter has of it."""

    name: str
    cells: list[Cell]


def drafters(result: EvaluationResult) -> list[DrafterResult]:
    """The speculators, then the baseline."""
    return [*result.speculators, result.prompt_lookup]


def comparison_rows(result: EvaluationResult) -> list[Row]:
    columns = drafters(result)
    widest = max(len(drafter.acceptance_per_position) for drafter in columns)

    def row(name: str, cell: Callable[[DrafterResult], Cell]) -> Row:
        return Row(name, [cell(drafter) for drafter in columns])

    return [
        row("acceptance length", lambda d: Cell(fixed(d.acceptance_length.mean), interval(d.acceptance_length))),
        row("tokens per target forward", lambda d: Cell(fixed(d.tokens_per_round.mean), interval(d.tokens_per_round))),
        *(row(f"accepted up to token {i + 1}", _position(i)) for i in range(widest)),
        row("identical outputs", _identical),
        *_lossy_rows(columns, row),
        row("target forwards saved", lambda d: Cell(percent(d.target_forwards_saved, 1), _forwards(d))),
        row("speed-up, measured", lambda d: Cell(times(d.speedup.median), _spread(d))),
        row("speed-up, predicted", lambda d: Cell(times(d.speedup_predicted))),
        row("same, where memory-bound", lambda d: Cell(times(d.speedup_memory_bound), "predicted")),
        row("draft + verify a round", _round_cost),
        row("parameters", lambda d: Cell(count(d.num_parameters) if d.num_parameters else "none")),
    ]


def interval(interval: Interval) -> str:
    return between(interval.low, interval.high)


def _position(index: int) -> Callable[[DrafterResult], Cell]:
    def cell(drafter: DrafterResult) -> Cell:
        shares = drafter.acceptance_per_position
        return Cell(percent(shares[index], 1) if index < len(shares) else percent(None))

    return cell


def _lossy_rows(
    columns: Sequence[DrafterResult], row: Callable[[str, Callable[[DrafterResult], Cell]], Row]
) -> list[Row]:
    """Where a rule was at work, and where accuracy was asked for."""
    rows = []
    if any(drafter.lossy_rule is not None for drafter in columns):
        rows.append(row("accepted mismatches (lossy)", lambda d: Cell(count(d.num_lossy_accepted))))
        rows.append(row("tokens per target call", lambda d: Cell(fixed(d.tokens_per_target_call))))
    if any(drafter.accuracy is not None for drafter in columns):
        rows.append(row("accuracy", lambda d: Cell(percent(d.accuracy, 1), f"{d.num_unanswered} without answer")))
    return rows


def _identical(drafter: DrafterResult) -> Cell:
    if drafter.lossy_rule is not None:
        return Cell(
            "lossy", NONE if drafter.num_identical is None else f"{drafter.num_identical} of {len(drafter.prompts)}"
        )
    if drafter.identical_outputs is None:
        return Cell("not compared", "sampled")
    return Cell("yes" if drafter.identical_outputs else "no", f"{drafter.num_identical} of {len(drafter.prompts)}")


def _forwards(drafter: DrafterResult) -> str:
    return f"{count(drafter.target_forwards_plain)} → {count(drafter.target_forwards)}"


def _spread(drafter: DrafterResult) -> str:
    return f"{times(drafter.speedup.low)} to {times(drafter.speedup.high)}"


def _round_cost(drafter: DrafterResult) -> Cell:
    costs = drafter.costs
    if drafter.speedup_predicted is None:
        return Cell(fixed(None))
    return Cell(f"{milliseconds(costs.draft)} + {milliseconds(costs.verify)}")


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


def _column_width(rows: Sequence[Row], labels: Sequence[str], column: int) -> int:
    return max(*(len(str(row.cells[column])) for row in rows), min(len(labels[column]), _MAX_COLUMN))


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
        cells = [row.cells[column].text if narrow else str(row.cells[column]) for column in columns]
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
