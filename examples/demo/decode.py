"""The demo's measurement: held-out prompts decoded with and without the speculator, one at a time as in a chat."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from examples.demo.answers import encode_prompts
from verl_speculator.decoding import AcceptanceCounts, DecodingResult, greedy_generate, speculative_generate, sum_counts
from verl_speculator.models import Speculator


@dataclass
class DecodedPrompt:
    request: str
    plain: DecodingResult
    speculative: DecodingResult

    @property
    def is_identical(self) -> bool:
        return self.plain.tokens == self.speculative.tokens

    @property
    def fresh_length(self) -> int:
        """How many tokens the answer has before it begins to repeat itself."""
        return length_before_loop(self.plain.tokens[0])


@dataclass
class Measurement:
    prompts: list[DecodedPrompt]
    plain_seconds: float
    speculative_seconds: float

    @property
    def counts(self) -> AcceptanceCounts:
        return sum_counts(prompt.speculative.counts for prompt in self.prompts)

    @property
    def counts_before_loops(self) -> AcceptanceCounts:
        """Without the rounds in which an output only repeats itself, which a draft head of any quality can follow."""
        return sum_counts(_counts_up_to(prompt.speculative, prompt.fresh_length) for prompt in self.prompts)

    @property
    def share_in_loops(self) -> float:
        """The share of the generated tokens from where their output begins to repeat itself."""
        return 1 - sum(prompt.fresh_length for prompt in self.prompts) / self.num_tokens

    @property
    def identical_outputs(self) -> bool:
        return all(prompt.is_identical for prompt in self.prompts)

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt.plain.tokens[0]) for prompt in self.prompts)

    @property
    def plain_forwards(self) -> int:
        return sum(prompt.plain.num_target_forwards for prompt in self.prompts)

    @property
    def speculative_forwards(self) -> int:
        return sum(prompt.speculative.num_target_forwards for prompt in self.prompts)


def measure(
    model: Any,
    speculator: Speculator,
    tokenizer: PreTrainedTokenizerFast,
    requests: list[str],
    *,
    max_new_tokens: int,
    report: Callable[[int], None],
) -> Measurement:
    """Decode every request both ways, greedily."""
    measurement = Measurement([], 0.0, 0.0)
    for request in requests:
        prompt = encode_prompts(tokenizer, [request])["input_ids"]
        limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": tokenizer.eos_token_id}
        start = time.perf_counter()
        plain = greedy_generate(model, prompt, **limits)
        middle = time.perf_counter()
        speculative = speculative_generate(model, speculator, prompt, **limits)
        measurement.plain_seconds += middle - start
        measurement.speculative_seconds += time.perf_counter() - middle
        measurement.prompts.append(DecodedPrompt(request, plain, speculative))
        report(len(measurement.prompts))
    return measurement


def length_before_loop(tokens: list[int], width: int = 4) -> int:
    """Tokens before the first run of `width` tokens that the text has had already."""
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - width + 1):
        run = tuple(tokens[start : start + width])
        if run in seen:
            return start
        seen.add(run)
    return len(tokens)


def _counts_up_to(result: DecodingResult, length: int) -> AcceptanceCounts:
    """Counts of the rounds that begin within the first `length` tokens of a one-row result."""
    rounds, position = [], 1  # the prompt's own forward brings the first token
    for accepted in result.accepted_per_draft[0]:
        if position < length:
            rounds.append(accepted)
        position += accepted + 1
    return AcceptanceCounts.from_drafts(rounds, result.num_draft_tokens)


def mark_accepted(tokenizer: PreTrainedTokenizerFast, result: DecodingResult, before: str, after: str) -> str:
    """The text of a one-row result with every run of accepted draft tokens between `before` and `after`."""
    tokens = result.tokens[0]
    is_draft = [False]  # the prompt's own forward brings the first token
    for accepted in result.accepted_per_draft[0]:
        is_draft += [True] * accepted + [False]
    text, start = "", 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or is_draft[end] != is_draft[start]:
            piece = tokenizer.decode(tokens[start:end], skip_special_tokens=True)
            text += before + piece + after if is_draft[start] and piece else piece
            start = end
    return text
