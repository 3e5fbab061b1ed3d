"""The rows that the terminal's table and the report's share: a measure, and what each drafter has of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from verl_speculator.decoding import Interval
from verl_speculator.evaluation.numbers import between, count, fixed, milliseconds, percent, times
from verl_speculator.evaluation.results import DrafterResult, EvaluationResult


@dataclass(frozen=True)
class Cell:
    text: str
    more: str = ""


@dataclass(frozen=True)
class Row:
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
        row("target forwards saved", lambda d: Cell(percent(d.target_forwards_saved, 1), _forwards(d))),
        row("speed-up, measured", lambda d: Cell(times(d.speedup.median), _spread(d))),
        row("speed-up, predicted", lambda d: Cell(times(d.speedup_predicted))),
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


def _identical(drafter: DrafterResult) -> Cell:
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
