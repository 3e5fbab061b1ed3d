"""Decoding the prompts with and without drafts, side by side, and how well the target predicts reference answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from verl_speculator.base_model.loading import Target, explain_out_of_memory
from verl_speculator.data.prompts import Prompt, left_pad
from verl_speculator.decoding import (
    AcceptanceRule,
    DecodingResult,
    NgramDrafter,
    SamplingParams,
    generate,
    speculative_generate,
)
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.models import ChainSpeculator

_WARM_UP_TOKENS = 8

Report = Callable[[str, int, int], None]  # what is being done, done so far, in all


@dataclass
class Drafting:
    """One way to draft, and what came of it: a result per batch, and the seconds that it took.

    `weight_share` is what a round's drafts read of weights, over what the target reads for a token; None if unknown.
    """

    label: str
    drafter: Any  # a speculator, or the prompt lookup
    num_draft_tokens: int
    draft_sampling: Literal["greedy", "random"] = "greedy"
    path: Path | None = None
    num_parameters: int = 0
    results: list[DecodingResult] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    weight_share: float | None = None
    rule: str | None = None  # with an acceptance rule, decoding is lossy
    accepts: AcceptanceRule | None = None


@dataclass
class Measurement:
    """What was decoded. `batches` holds indices of prompts; each result's rows are in the order of its batch's."""

    batches: list[list[int]]
    plain: list[DecodingResult]
    plain_seconds: list[float]
    drafted: list[Drafting]


def measure(
    target: Target, drafted: list[Drafting], prompts: Sequence[Prompt], settings: EvaluationSettings, report: Report
) -> Measurement:
    """Decode every batch plainly and with each drafter, one right after the other.

    Which goes first changes from batch to batch, so that a machine that slows down or speeds up favours none.

    Raises:
        ConfigError: Out of memory; the message says what to lower.
    """
    batches = _batches(prompts, settings.batch_size)
    measurement = Measurement(batches, [], [], drafted)
    with explain_out_of_memory("decoding", settings.memory_advice):
        _warm_up(target, drafted, [prompts[index] for index in batches[0]], settings)
        for way in drafted:
            way.weight_share = _weight_share(way, target)
        done = 0
        report("Decoding", done, len(prompts))
        for number, batch in enumerate(batches):
            _decode_batch(measurement, target, [prompts[index] for index in batch], number, settings)
            done += len(batch)
            report("Decoding", done, len(prompts))
    return measurement


def _batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    # Similar lengths together: little padding.
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].prompt_ids))
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def _decode_batch(
    measurement: Measurement, target: Target, prompts: list[Prompt], number: int, settings: EvaluationSettings
) -> None:
    ways: list[Drafting | None] = [None, *measurement.drafted]
    first = number % len(ways)
    for way in ways[first:] + ways[:first]:
        result, seconds = _timed_decode(target, prompts, way, settings, settings.max_new_tokens, settings.seed + number)
        if way is None:
            measurement.plain.append(result)
            measurement.plain_seconds.append(seconds)
        else:
            way.results.append(result)
            way.seconds.append(seconds)


def _warm_up(target: Target, drafted: list[Drafting], prompts: list[Prompt], settings: EvaluationSettings) -> None:
    """The first forwards of a process are slow: memory is allocated, kernels are chosen."""
    for way in (None, *drafted):
        _timed_decode(target, prompts, way, settings, min(_WARM_UP_TOKENS, settings.max_new_tokens), settings.seed)


@torch.inference_mode()
def _weight_share(way: Drafting, target: Target) -> float | None:
    """For one row a matrix product does two operations for each weight that it reads: operations count weights."""
    if isinstance(way.drafter, NgramDrafter):
        return 0.0
    if not isinstance(way.drafter, ChainSpeculator):
        return None
    token = torch.zeros(1, dtype=torch.long, device=target.device)
    hidden = torch.zeros(1, way.drafter.config.input_hidden_dim, dtype=target.dtype, device=target.device)
    with FlopCounterMode(display=False) as draft:
        way.drafter.draft(hidden, token, way.num_draft_tokens)
    with FlopCounterMode(display=False) as step:
        target.model(input_ids=token[None])
    return draft.get_total_flops() / step.get_total_flops()


def _timed_decode(
    target: Target,
    prompts: list[Prompt],
    way: Drafting | None,
    settings: EvaluationSettings,
    max_new_tokens: int,
    seed: int,
) -> tuple[DecodingResult, float]:
    input_ids, attention_mask = left_pad([prompt.prompt_ids for prompt in prompts], target.tokenizer, target.device)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampling": SamplingParams(settings.temperature, settings.top_p, settings.top_k),
        "eos_token_id": target.stop_tokens,
        "generator": torch.Generator(target.device).manual_seed(seed),
    }
    _synchronize(target.device)
    start = time.perf_counter()
    if way is None:
        result = generate(target.model, input_ids, attention_mask, **options)
    else:
        options |= {"num_draft_tokens": way.num_draft_tokens, "draft_sampling": way.draft_sampling}
        options["lossy_rule"] = way.accepts
        result = speculative_generate(target.model, way.drafter, input_ids, attention_mask, **options)
    _synchronize(target.device)
    return result, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def by_prompt(batches: list[list[int]], results: Sequence[DecodingResult]) -> Iterator[tuple[DecodingResult, int]]:
    """The result that holds a prompt and its row there, for every prompt in turn."""
    positions = {index: (number, row) for number, batch in enumerate(batches) for row, index in enumerate(batch)}
    for index in sorted(positions):
        number, row = positions[index]
        yield results[number], row


def held_out_loss(
    target: Target, prompts: Sequence[Prompt], settings: EvaluationSettings, report: Report
) -> tuple[float | None, int]:
    """The target's mean cross entropy (nats) over all tokens of the reference answers, and how many those are.

    Each answer is read after its own prompt, cut where the context ends. None without a single reference token.
    """
    answered = [prompt for prompt in prompts if prompt.answer_ids]
    context = getattr(target.model.config.get_text_config(), "max_position_embeddings", None)
    total, count = 0.0, 0
    advice = "lower --num-prompts to leave out the longest answers, or use --dtype bfloat16"
    with explain_out_of_memory("reading the reference answers", advice), torch.inference_mode():
        for done, prompt in enumerate(answered, start=1):
            tokens = [*prompt.prompt_ids, *prompt.answer_ids][:context]
            num_answer = len(tokens) - len(prompt.prompt_ids)
            input_ids = torch.tensor([tokens], device=target.device)
            # The model's own forward, because some models scale or cap what lm_head returns.
            logits = target.model(input_ids=input_ids, logits_to_keep=num_answer + 1).logits[0, -num_answer - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits.float(), input_ids[0, -num_answer:], reduction="sum")
            total, count = total + loss.item(), count + num_answer
            report("Reference answers", done, len(answered))
    return (total / count, count) if count else (None, 0)
