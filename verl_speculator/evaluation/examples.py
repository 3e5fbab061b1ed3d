"""Which prompts a report shows, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from verl_speculator.evaluation.numbers import fixed, plural
from verl_speculator.evaluation.pieces import Piece
from verl_speculator.evaluation.results import DrafterResult, EvaluationResult, PromptResult

NUM_SHOWN = 3
_MIN_ROUNDS = 5  # an answer of a few tokens is the best or the worst by chance
_MAX_HEADING = 90


@dataclass(frozen=True)
class Output:
    heading: str
    pieces: list[tuple[str, int, bool, str]]  # as Piece, and what is said on hovering


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


def _hint(piece: Piece, prompt: PromptResult) -> str:
    _, number, is_draft = piece
    if number == 0:
        return "from the prompt's own forward pass"
    accepted = prompt.accepted_per_round[number - 1]
    return f"round {number}: " + (
        f"{plural(accepted, 'draft token')} accepted" if is_draft else "the target's own token"
    )
