"""From what was decoded to what is reported."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verl_speculator.base_model.loading import Target
from verl_speculator.data.prompts import Prompt
from verl_speculator.decoding import (
    DecodingResult,
    DecodingTimes,
    TargetForwards,
    acceptance_length_interval,
    predicted_speedup,
    sum_counts,
    tokens_per_round_interval,
)
from verl_speculator.evaluation.measure import Drafting, Measurement, by_prompt
from verl_speculator.evaluation.results import Costs, DrafterResult, PromptResult, Speedup, TargetHealth
from verl_speculator.scorer.answers import AnswerCheck

_INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character


Answers = Mapping[tuple[str, int], str]  # by file and row


def summarize_drafting(
    measurement: Measurement,
    drafting: Drafting,
    prompts: Sequence[Prompt],
    target: Target,
    *,
    is_greedy: bool,
    answers: Answers | None = None,
) -> DrafterResult:
    """Everything about one drafter. Outputs are compared with plain decoding's only if both are greedy.

    With an acceptance rule they are counted where they are the same, and need not be.
    """
    per_prompt = list(by_prompt(measurement.batches, drafting.results))
    plain = [result.tokens[row] for result, row in by_prompt(measurement.batches, measurement.plain)]
    counts = [result.counts_per_row[row] for result, row in per_prompt]
    total = sum_counts(counts)
    identical = [result.tokens[row] == tokens for (result, row), tokens in zip(per_prompt, plain, strict=True)]
    forwards = sum((result.target_forwards for result in drafting.results), TargetForwards())
    costs = _costs(measurement.plain, drafting.results)
    texts = [_text(target, result.tokens[row]) for result, row in per_prompt]
    accuracy, num_unanswered = grade(texts, prompts, answers)
    return DrafterResult(
        label=drafting.label,
        path=None if drafting.path is None else str(drafting.path),
        num_draft_tokens=drafting.num_draft_tokens,
        num_parameters=drafting.num_parameters,
        acceptance_length=acceptance_length_interval(counts),
        tokens_per_round=tokens_per_round_interval(counts),
        acceptance_per_position=total.acceptance_rate_per_position,
        accepted_lengths=total.drafts_per_accepted_length,
        num_drafts=total.num_drafts,
        num_accepted_tokens=total.num_accepted_tokens,
        target_forwards=forwards.used,
        target_forwards_plain=forwards.plain,
        target_forwards_saved=forwards.share_saved,
        identical_outputs=all(identical) if is_greedy and drafting.rule is None else None,
        num_identical=sum(identical) if is_greedy else None,
        speedup=paired_speedup(_ratios(measurement, drafting)),
        speedup_predicted=_predict(total.tokens_per_round, costs),
        speedup_memory_bound=None
        if drafting.weight_share is None
        else predicted_speedup(
            total.tokens_per_round, plain_step_cost=1, verify_cost=1, draft_cost=drafting.weight_share
        ),
        costs=costs,
        prompts=[
            _prompt_result(prompt, result, row, same if is_greedy else None, target)
            for prompt, (result, row), same in zip(prompts, per_prompt, identical, strict=True)
        ],
        lossy_rule=drafting.rule,
        num_lossy_accepted=sum(len(result.lossy_tokens[row]) for result, row in per_prompt if result.lossy_tokens),
        tokens_per_target_call=sum(len(result.tokens[row]) for result, row in per_prompt) / forwards.used,
        accuracy=accuracy,
        num_unanswered=num_unanswered,
    )


def grade(texts: Sequence[str], prompts: Sequence[Prompt], answers: Answers | None) -> tuple[float | None, int]:
    """The share of texts that give the right answer, and from how many none could be extracted; they count as wrong."""
    if answers is None:
        return None, 0
    check = AnswerCheck()
    right = [
        check.is_correct(text, answers[prompt.chat.file, prompt.chat.row])
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    return sum(one is True for one in right) / len(right), right.count(None)


def summarize_target(
    measurement: Measurement,
    loss: float | None,
    loss_tokens: int,
    prompts: Sequence[Prompt] = (),
    target: Target | None = None,
    answers: Answers | None = None,
) -> TargetHealth:
    outputs = [tokens for result in measurement.plain for tokens in result.tokens]
    accuracy = None
    if target is not None:
        texts = [_text(target, result.tokens[row]) for result, row in by_prompt(measurement.batches, measurement.plain)]
        accuracy, _ = grade(texts, prompts, answers)
    num_tokens = sum(map(len, outputs))
    return TargetHealth(
        held_out_loss=loss,
        held_out_tokens=loss_tokens,
        repeated_4grams=repeated_share(outputs),
        num_tokens=num_tokens,
        tokens_per_second=num_tokens / sum(measurement.plain_seconds),
        accuracy=accuracy,
    )


def _text(target: Target, tokens: Sequence[int]) -> str:
    """What an answer says: without the tokens that end it."""
    kept = [token for token in tokens if token not in target.stop_tokens]
    text: str = target.tokenizer.decode(kept, clean_up_tokenization_spaces=False)
    return text


def _ratios(measurement: Measurement, drafting: Drafting) -> list[float]:
    """Tokens per second of each batch over those of its plain decoding; sampled outputs differ in length."""
    rates = zip(measurement.plain, measurement.plain_seconds, drafting.results, drafting.seconds, strict=True)
    return [
        (_num_tokens(drafted) / seconds) / (_num_tokens(plain) / plain_seconds)
        for plain, plain_seconds, drafted, seconds in rates
    ]


def _num_tokens(result: DecodingResult) -> int:
    return sum(map(len, result.tokens))


def _costs(plain: Sequence[DecodingResult], drafted: Sequence[DecodingResult]) -> Costs:
    steps, rounds = (sum(result.num_rounds for result in results) for results in (plain, drafted))
    plain_times, times = (sum((result.times for result in results), DecodingTimes()) for results in (plain, drafted))
    return Costs(
        plain_step=_ratio(plain_times.verify, steps),
        draft=_ratio(times.draft, rounds),
        verify=_ratio(times.verify, rounds),
        other=_ratio(times.other, rounds),
    )


def _ratio(seconds: float, count: int) -> float:
    return seconds / count if count else math.nan


def _predict(tokens_per_round: float, costs: Costs) -> float | None:
    if math.isnan(costs.plain_step) or math.isnan(costs.verify):
        return None
    return predicted_speedup(
        tokens_per_round, plain_step_cost=costs.plain_step, verify_cost=costs.verify, draft_cost=costs.draft
    )


def _prompt_result(
    prompt: Prompt, result: DecodingResult, row: int, identical: bool | None, target: Target
) -> PromptResult:
    tokens, accepted = result.tokens[row], result.accepted_per_round[row]
    return PromptResult(
        file=prompt.chat.file,
        row=prompt.chat.row,
        request=prompt.chat.request,
        text=target.tokenizer.decode(tokens, clean_up_tokenization_spaces=False),
        num_tokens=len(tokens),
        acceptance_length=result.counts_per_row[row].acceptance_length,
        num_drafts=result.num_drafts[row],
        accepted_per_round=list(accepted),
        identical=identical,
        pieces=output_pieces(target.tokenizer, tokens, accepted),
    )


def output_pieces(
    tokenizer: Any, tokens: Sequence[int], accepted_per_round: Sequence[int]
) -> list[tuple[str, int, bool]]:
    """`(text, round, was drafted)` of each run of tokens; joined, the texts are the text of `tokens`.

    Round 0 is the prompt's own forward, which brings the first token. Every other brings the drafts that it accepts and
    one token of the target's; of the last round, tokens past the end are not there. A character whose bytes come from
    several runs is shown in the one that completes it.
    """
    pieces: list[tuple[str, int, bool]] = []
    shown = 0
    for start, end, round_number, is_draft in _runs(len(tokens), accepted_per_round):
        text = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        # What is decoded is always the text's beginning: a token's text may depend on those before it.
        complete = len(text) if end == len(tokens) else len(text.rstrip(_INCOMPLETE))
        if complete > shown and end > start:
            pieces.append((text[shown:complete], round_number, is_draft))
            shown = complete
    return pieces


def _runs(num_tokens: int, accepted_per_round: Sequence[int]) -> list[tuple[int, int, int, bool]]:
    runs, position = [(0, min(1, num_tokens), 0, False)], 1
    for number, accepted in enumerate(accepted_per_round, start=1):
        for length, is_draft in ((accepted, True), (1, False)):
            end = min(position + length, num_tokens)
            if end > position:
                runs.append((position, end, number, is_draft))
            position = end
    return runs


def repeated_share(outputs: Iterable[Sequence[int]], width: int = 4) -> float | None:
    """The share of `width`-grams that their own output has had before: 1 - distinct / all, summed over outputs.

    Welleck et al. 2020, "Neural text generation with unlikelihood training", call it seq-rep-n. None where no output
    is as long as one.
    """
    total = distinct = 0
    for tokens in outputs:
        grams = [tuple(tokens[start : start + width]) for start in range(len(tokens) - width + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return 1 - distinct / total if total else None


def paired_speedup(ratios: Sequence[float]) -> Speedup:
    """Median and quartiles of the batches' own ratios: load that comes and goes hits both sides of a ratio alike."""
    if len(ratios) == 1:
        return Speedup(ratios[0], ratios[0], ratios[0], list(ratios))
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Speedup(median, low, high, list(ratios))
