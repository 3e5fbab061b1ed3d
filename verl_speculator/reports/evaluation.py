"""The report of an evaluation: `eval.json` for programs, `index.html` for people."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from verl_speculator.evaluation.results import DrafterResult, EvaluationResult, PromptResult
from verl_speculator.reports.charts import RangeRow, Series, bar_chart, legend, line_chart, range_chart, series_style
from verl_speculator.reports.curves import Curves, find_run, read_curves
from verl_speculator.reports.page import Tile, render, write_file
from verl_speculator.reports.table import comparison_rows, drafters, interval
from verl_speculator.reports.training import compared_charts
from verl_speculator.reports.writing import count, fixed, milliseconds, percent, plural, short, times

JSON_FILE, PAGE_FILE = "eval.json", "index.html"
NUM_SHOWN = 3
_MIN_ROUNDS = 5  # an answer of a few tokens is the best or the worst by chance
_MAX_HEADING = 90


class ReportFiles(NamedTuple):
    json: Path
    page: Path


def write_report(
    result: EvaluationResult, folder: str | os.PathLike[str], runs: Sequence[str | os.PathLike[str]] = ()
) -> ReportFiles:
    """Write both files into `folder`, each whole or not at all.

    Args:
        runs: Training runs whose curves the page shows; none takes those whose folders the speculators lie in.

    Raises:
        SpeculatorError: A run's log is not there or not readable.
    """
    page = render_page(result, read_runs(result, runs))
    files = ReportFiles(Path(folder) / JSON_FILE, Path(folder) / PAGE_FILE)
    write_file(files.json, as_json(result))
    write_file(files.page, page)
    return files


def as_json(result: EvaluationResult) -> str:
    """The contents of `eval.json`."""
    return json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"


def read_runs(result: EvaluationResult, runs: Sequence[str | os.PathLike[str]]) -> list[tuple[str, Curves]]:
    """The curves of the runs, under the names that the speculators have where there is one run for each."""
    if not runs:
        found = {
            drafter.label: find_run(drafter.path)
            for drafter in result.speculators
            if drafter.path is not None and drafter.lossy_rule is None
        }
        return [(label, read_curves(run)) for label, run in found.items() if run is not None]
    if len(runs) == len(result.speculators):
        return [(drafter.label, read_curves(run)) for drafter, run in zip(result.speculators, runs, strict=True)]
    return [(Path(run).resolve().name, read_curves(run)) for run in runs]


def render_page(result: EvaluationResult, runs: Sequence[tuple[str, Curves]] = ()) -> str:
    shown = drafters(result)
    series = [Series(drafter.label, series_style(index)) for index, drafter in enumerate(result.speculators)]
    series.append(Series(result.prompt_lookup.label, "base"))
    best, worst = best_and_worst(result)
    return render(
        "evaluation.html.jinja",
        title="Speculator report: " + " and ".join(drafter.label for drafter in result.speculators),
        subtitle=f"{plural(result.num_prompts, 'prompt')} decoded by {result.base}, with drafts and without",
        tiles=_headline(result),
        first=result.speculators[0].label if len(result.speculators) > 1 else "",
        notes=result.notes,
        legend=Markup(legend(series)),
        line_legend=Markup(legend(series, dashed=True)),
        charts={name: Markup(svg) for name, svg in _charts(shown, series).items()},
        table={"columns": [drafter.label for drafter in shown], "rows": comparison_rows(result)},
        plain_step=milliseconds(shown[0].costs.plain_step),
        health=_health(result),
        training=compared_charts(runs) if runs else [],
        best=best,
        worst=worst,
        facts=_facts(result),
    )


def _headline(result: EvaluationResult) -> list[Tile]:
    first = result.speculators[0]
    predicted = f"; predicted {times(first.speedup_predicted)}" if first.speedup_predicted is not None else ""
    if first.speedup_memory_bound is not None:
        predicted += f", and {times(first.speedup_memory_bound)} where reading weights is all that a forward costs"
    batches = plural(len(first.speedup.per_batch), "batch").replace("batchs", "batches")
    return [
        Tile(
            "Acceptance length",
            fixed(first.acceptance_length.mean),
            f"tokens per draft and its target token; 95 % interval {interval(first.acceptance_length)}",
            unit=f"± {(first.acceptance_length.high - first.acceptance_length.low) / 2:.2f}",
        ),
        Tile(
            "Speed-up",
            times(first.speedup.median),
            f"median of {batches}, middle half {times(first.speedup.low)} to {times(first.speedup.high)}{predicted}",
        ),
        _identical_tile(first),
        Tile(
            "Target forwards saved",
            percent(first.target_forwards_saved),
            f"{count(first.target_forwards)} instead of {count(first.target_forwards_plain)}",
        ),
    ]


def _identical_tile(drafter: DrafterResult) -> Tile:
    what, total = "Outputs with drafts", len(drafter.prompts)
    if drafter.identical_outputs is None:
        return Tile(what, "Sampled", "two samples differ, so they are not compared", is_word=True)
    if drafter.identical_outputs:
        return Tile(
            what, "✓ Identical", f"to plain greedy decoding, all {plural(total, 'prompt')}", is_word=True, state="good"
        )
    return Tile(
        what, "✗ Different", f"{drafter.num_identical} of {total} are plain decoding's", is_word=True, state="bad"
    )


def _health(result: EvaluationResult) -> list[Tile]:
    target, lookup = result.target, result.prompt_lookup
    read = plural(target.held_out_tokens, "token")
    return [
        Tile(
            "Held-out loss",
            fixed(target.held_out_loss, 3),
            f"{read} of the data's own answers" if target.held_out_tokens else "the data has no answers",
            unit="nats a token" if target.held_out_loss is not None else "",
        ),
        Tile(
            "Repeated 4-grams",
            percent(target.repeated_4grams, 1),
            "of those it generates stood in the same output before",
        ),
        Tile(
            "Prompt lookup",
            fixed(lookup.tokens_per_round.mean),
            f"tokens per target forward without any training; 95 % interval {interval(lookup.tokens_per_round)}",
        ),
        Tile(
            "Plain decoding", f"{target.tokens_per_second:.3g}", f"{count(target.num_tokens)} tokens", unit="tokens / s"
        ),
    ]


def _charts(shown: Sequence[DrafterResult], series: Sequence[Series]) -> dict[str, str]:
    pairs = list(zip(series, shown, strict=True))
    longest = max(drafter.num_draft_tokens for drafter in shown)
    timed = [(one, drafter) for one, drafter in pairs if drafter.speedup_predicted is not None]
    return {
        "lengths": range_chart(
            [
                RangeRow(one, d.tokens_per_round.mean, d.tokens_per_round.low, d.tokens_per_round.high)
                for one, d in pairs
            ],
            title="Tokens per target forward",
            x_label="tokens per target forward",
            write=fixed,
            reference=1.0,
            reference_label="without drafts",
        ),
        "positions": bar_chart(
            [str(index + 1) for index in range(longest)],
            [(one, drafter.acceptance_per_position) for one, drafter in pairs],
            title="Acceptance per position",
            x_label="draft position",
            y_label="share of drafts",
            write=percent,
        ),
        "distribution": bar_chart(
            [str(index) for index in range(longest + 1)],
            [(one, drafter.accepted_length_shares) for one, drafter in pairs],
            title="Accepted draft tokens per round",
            x_label="accepted draft tokens",
            y_label="share of drafts",
            write=percent,
        ),
        "per_prompt": line_chart(
            [(one, _sorted_lengths(drafter)) for one, drafter in pairs],
            title="Acceptance length of every prompt",
            x_label="prompts, best drafted first",
            y_label="acceptance length",
        ),
        "speedup": range_chart(
            [RangeRow(one, d.speedup.median, d.speedup.low, d.speedup.high, d.speedup_predicted) for one, d in pairs],
            title="Speed-up over plain decoding",
            x_label="times as many tokens a second",
            write=times,
            reference=1.0,
            reference_label="plain decoding",
        ),
        "costs": bar_chart(
            ["draft", "verify", "bookkeeping", "whole round"],
            [(one, _round_milliseconds(drafter)) for one, drafter in timed],
            title="Where a round's time goes",
            x_label="part of a round",
            y_label="milliseconds",
            write=short,
            reference=shown[0].costs.plain_step * 1e3,
        )
        if timed
        else "",
    }


def _round_milliseconds(drafter: DrafterResult) -> list[float]:
    costs = drafter.costs
    parts = [costs.draft, costs.verify, costs.other]
    return [1e3 * seconds for seconds in (*parts, sum(parts))]


def _sorted_lengths(drafter: DrafterResult) -> list[tuple[int, float]]:
    lengths = sorted((prompt.acceptance_length for prompt in drafter.prompts), reverse=True)
    return list(enumerate(lengths, start=1))


def _facts(result: EvaluationResult) -> list[tuple[str, str]]:
    settings, machine = result.settings, result.machine
    sampling = (
        "greedy"
        if settings["temperature"] == 0
        else f"temperature {settings['temperature']}, top-p {settings['top_p']}, top-k {settings['top_k']}, "
        f"seed {settings['seed']}, {settings['draft_sampling']} drafts"
    )
    drafted = ", ".join(f"{drafter.label} {drafter.num_draft_tokens}" for drafter in result.speculators)
    return [
        ("Base", result.base),
        ("Speculators", ", ".join(str(drafter.path) for drafter in result.speculators)),
        ("Data", ", ".join(result.data)),
        ("Decoding", f"{sampling}; up to {settings['max_new_tokens']} new tokens, {settings['batch_size']} at once"),
        ("Draft tokens", drafted),
        ("Numbers", f"{settings['dtype']} on {settings['device']}"),
        (
            "Machine",
            f"{machine['accelerator'] or machine['architecture']}, {machine['cores']} cores, "
            f"{machine['threads']} threads of torch",
        ),
        ("Versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
        ("Measured", result.created),
    ]


@dataclass(frozen=True)
class Output:
    heading: str
    pieces: list[tuple[str, int, bool, str]]  # as PromptResult.pieces, and what is said on hovering


@dataclass(frozen=True)
class Example:
    length: str
    heading: str
    where: str
    request: str
    outputs: list[Output]  # of each speculator
    open: bool


def best_and_worst(result: EvaluationResult) -> tuple[list[Example], list[Example]]:
    """The prompts with the highest and the lowest acceptance length of the first speculator; none is in both."""
    prompts = result.speculators[0].prompts
    long_enough = [index for index, prompt in enumerate(prompts) if len(prompt.accepted_per_round) >= _MIN_ROUNDS]
    candidates = long_enough if len(long_enough) > 1 else list(range(len(prompts)))
    ranked = sorted(candidates, key=lambda index: -prompts[index].acceptance_length)
    num_worst = min(NUM_SHOWN, len(ranked) // 2)
    best = ranked[: min(NUM_SHOWN, len(ranked) - num_worst)]
    worst = ranked[len(ranked) - num_worst :][::-1]
    return [_example(result, index, index == best[0]) for index in best], [
        _example(result, index, index == worst[0]) for index in worst
    ]


def _example(result: EvaluationResult, index: int, is_open: bool) -> Example:
    prompt = result.speculators[0].prompts[index]
    return Example(
        length=fixed(prompt.acceptance_length),
        heading=_heading(prompt.request),
        where=f"{Path(prompt.file).name}, row {prompt.row}",
        request=prompt.request,
        outputs=[_output(drafter, drafter.prompts[index]) for drafter in result.speculators],
        open=is_open,
    )


def _heading(request: str) -> str:
    line = next((line.strip() for line in request.splitlines() if line.strip()), "(empty)")
    return line if len(line) <= _MAX_HEADING else line[: _MAX_HEADING - 1] + "…"


def _output(drafter: DrafterResult, prompt: PromptResult) -> Output:
    same = {True: "", False: "; differs from plain decoding", None: ""}[prompt.identical]
    heading = (
        f"{drafter.label}: {plural(prompt.num_tokens, 'token')} in {plural(len(prompt.accepted_per_round), 'round')}, "
        f"acceptance length {fixed(prompt.acceptance_length)}{same}"
    )
    return Output(heading, [(*piece, _hint(piece, prompt)) for piece in prompt.pieces])


def _hint(piece: tuple[str, int, bool], prompt: PromptResult) -> str:
    _, number, is_draft = piece
    if number == 0:
        return "from the prompt's own forward pass"
    accepted = prompt.accepted_per_round[number - 1]
    return f"round {number}: " + (
        f"{plural(accepted, 'draft token')} accepted" if is_draft else "the target's own token"
    )
