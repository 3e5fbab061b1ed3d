"""The page of a comparison of acceptance rules: what they save, what they cost, and answers with their marks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from markupsafe import Markup

from verl_speculator.reports.charts import Series, legend, scatter_chart, series_style
from verl_speculator.reports.page import Tile, render, write_file
from verl_speculator.reports.writing import NONE, count, fixed, percent, plural, short, times

PAGE_FILE = "index.html"
STRICT, ORACLE = "strict", "oracle"
_COLUMNS = (
    "rule",
    "setting",
    "tokens per target call",
    "over strict",
    "accuracy",
    "loss",
    "loss at most (95 %)",
    "accepted mismatches",
    "prompts",
)


def rule_rows(values: dict[str, Any]) -> list[list[str]]:
    """The rules of an evaluation, best first; strict decoding and the oracle, which no rule can be, at the ends."""
    rules = values["rules"].values()
    order = {STRICT: -1, ORACLE: 1}
    ranked = sorted(rules, key=lambda rule: (order.get(rule["rule"], 0), -rule["tokens_per_target_call"]))
    return [
        [
            rule["rule"] + (" (lossless)" if not rule["is_lossy"] else ""),
            _setting(rule),
            fixed(rule["tokens_per_target_call"], 3),
            times(rule["speedup_over_strict"]),
            percent(rule["accuracy"], 1),
            percent(rule["accuracy_loss"], 2),
            percent(rule["accuracy_loss_upper_95"], 2),
            count(rule["num_lossy_accepted"]),
            count(rule["num_prompts"]),
        ]
        for rule in ranked
    ]


def format_rules(values: dict[str, Any]) -> str:
    """The same as lines of text."""
    rows = [list(_COLUMNS), *rule_rows(values)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def write_page(values: dict[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write `index.html` for what `verl-speculator scorer evaluate` has measured."""
    file = Path(folder) / PAGE_FILE
    write_file(file, render_page(values))
    return file


def render_page(values: dict[str, Any]) -> str:
    rules = [rule for label, rule in values["rules"].items() if label != ORACLE]
    bound = values["accuracy_bound"]
    series = [
        Series(rule["rule"], "base" if rule["rule"] == STRICT else series_style(i)) for i, rule in enumerate(rules)
    ]
    by_name = {one.name: one for one in series}
    points = [
        (one, 100 * rule["accuracy_loss"], rule["tokens_per_target_call"])
        for one, rule in zip(series, rules, strict=True)
    ]
    paths = [
        (by_name[label], [(100 * one["accuracy_loss"], one["tokens_per_target_call"]) for one in choice["tried"]])
        for label, choice in values["validation"].items()
        if label in by_name
    ]
    return render(
        "scorer.html.jinja",
        title="Acceptance rules: what they save and what they cost",
        subtitle=f"{values['target']} decoded with drafts of {values['draft']}; every rule but strict is lossy",
        tiles=_tiles(values, rules, bound),
        legend=Markup(legend(series)),
        pareto=Markup(
            scatter_chart(
                points,
                paths,
                title="Tokens per target call over accuracy lost",
                x_label="points of accuracy lost",
                y_label="tokens per target call",
                write=short,
                reference=100 * bound,
                reference_label="bound",
            )
        ),
        columns=_COLUMNS,
        rows=rule_rows(values),
        examples=values["examples"],
        bound=percent(bound, 1),
    )


def _tiles(values: dict[str, Any], rules: list[dict[str, Any]], bound: float) -> list[Tile]:
    strict = values["rules"][STRICT]
    kept = [rule for rule in rules if rule["is_lossy"] and rule["accuracy_loss_upper_95"] <= bound]
    best = max(kept, key=lambda rule: rule["tokens_per_target_call"], default=None)
    oracle = values["rules"].get(ORACLE)
    return [
        Tile(
            "Strict, lossless",
            fixed(strict["tokens_per_target_call"], 3),
            f"{percent(strict['accuracy'], 1)} of {plural(strict['num_prompts'], 'answer')} are right",
            unit="tokens a call",
        ),
        Tile(
            "Best rule within the bound",
            NONE if best is None else times(best["speedup_over_strict"]),
            "no rule kept the bound"
            if best is None
            else f"{best['rule']}: {fixed(best['tokens_per_target_call'], 3)} tokens a call, "
            f"loses at most {percent(best['accuracy_loss_upper_95'], 2)}",
            state="" if best is None else "good",
        ),
        Tile(
            "If the future were known",
            NONE if oracle is None else times(oracle["speedup_over_strict"]),
            "not measured" if oracle is None else f"the oracle, on {plural(oracle['num_prompts'], 'prompt')}",
        ),
    ]


def _setting(rule: dict[str, Any]) -> str:
    if rule["setting"] is not None:
        return f"{rule['setting']:.4g}"
    return "none kept the bound" if rule["is_lossy"] and rule["equals_strict"] else ""
