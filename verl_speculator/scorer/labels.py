"""Which mismatches are harmless: put the draft in, let the target write the rest, and compare the answers.

AutoJudge (Garipov et al. 2025, arXiv:2504.20039) mines labels so. A completion after each mismatch of a window is also
all that a policy on it can bring about: one that stops at the first reject leaves the text after the last mismatch that
it has accepted, or the strict one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verl_speculator.base_model.loading import Target
from verl_speculator.data.prompts import left_pad
from verl_speculator.decoding import generate
from verl_speculator.decoding.acceptance import Verification
from verl_speculator.errors import DataError
from verl_speculator.scorer.answers import AnswerCheck, same_answer
from verl_speculator.scorer.data import Report, decode_texts
from verl_speculator.scorer.windows import ACCEPT, REJECT, Window


def complete(
    target: Target,
    prefixes: Sequence[list[int]],
    max_lengths: Sequence[int],
    *,
    batch_size: int,
    report: Report = lambda doing, done, total: None,
) -> list[list[int]]:
    """What the target writes greedily after each prefix, up to `max_lengths[i]` tokens of both together.

    A prefix that has ended, with a stop token, is followed by nothing.
    """
    completions: list[list[int]] = [[] for _ in prefixes]
    # Those that have as much to write together: a batch takes as long as its longest.
    order = sorted(range(len(prefixes)), key=lambda index: max_lengths[index] - len(prefixes[index]))
    order = [
        index
        for index in order
        if max_lengths[index] > len(prefixes[index]) and prefixes[index][-1] not in target.stop_tokens
    ]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        room = [max_lengths[index] - len(prefixes[index]) for index in batch]
        input_ids, mask = left_pad([prefixes[index] for index in batch], target.tokenizer, target.device)
        result = generate(target.model, input_ids, mask, max_new_tokens=max(room), eos_token_id=target.stop_tokens)
        for index, tokens, most in zip(batch, result.tokens, room, strict=True):
            completions[index] = tokens[:most]
        report("Completing", start + len(batch), len(order))
    return completions


def _context(window: Window) -> list[int]:
    return window.input_ids[: window.draft_start_idx]


@dataclass
class LabelCounts:
    num_harmless: int = 0
    num_harmful: int = 0
    num_unknown: int = 0  # after a harmful one in the same window
    num_unanswered: int = 0  # completions from which no answer could be extracted; they count as harmful


def mine_labels(
    target: Target,
    windows: Sequence[Window],
    *,
    max_new_tokens: int,
    batch_size: int,
    check: AnswerCheck | None = None,
    report: Report = lambda doing, done, total: None,
) -> tuple[list[Window], LabelCounts]:
    """The windows with `labels` and `correct` of their mismatches; drafts that match have none.

    Every mismatch is judged as if those before it had been accepted, so a label ends with the first that is harmful. It
    is compared with the completion of the window's context, which is what strict decoding answers.

    Raises:
        DataError: There is no window.
    """
    check = check or AnswerCheck()
    if not windows:
        raise DataError("there are no windows to label: no draft differed from what the target would have written")

    def written(prefixes: list[list[int]], of: Sequence[Window]) -> list[list[int]]:
        limits = [window.prompt_length + max_new_tokens for window in of]
        completions = complete(target, prefixes, limits, batch_size=batch_size, report=report)
        return [prefix + tokens for prefix, tokens in zip(prefixes, completions, strict=True)]

    # After a context that lies on its way the target goes on as it did from the prompt's first: one text answers all.
    firsts: dict[int, Window] = {}
    for window in windows:
        known = firsts.setdefault(window.prompt_index, window)
        if window.draft_start_idx < known.draft_start_idx:
            firsts[window.prompt_index] = window
    texts = dict(zip(firsts, written([_context(one) for one in firsts.values()], list(firsts.values())), strict=True))
    prefixes, owners = [], []
    for window in windows:
        context = _context(window)
        if texts[window.prompt_index][: len(context)] == context:
            context = texts[window.prompt_index]
        prefixes += [context, *(window.input_ids[: window.draft_start_idx + slot + 1] for slot in window.mismatches)]
        owners += [window] * (1 + len(window.mismatches))
    given = iter(
        check.extract(text)
        for text in decode_texts(
            target,
            [text[window.prompt_length :] for text, window in zip(written(prefixes, owners), owners, strict=True)],
        )
    )
    counts, labelled = LabelCounts(), []
    for window in windows:
        strict = next(given)
        labels, correct = list(window.labels), list(window.correct)
        astray = False
        for slot in window.mismatches:
            answer = next(given)
            correct[slot] = int(answer is not None and same_answer(answer, check.reference(window.answer)))
            counts.num_unanswered += answer is None
            if astray:
                # The text has gone wrong before: what this one does to it says nothing of it.
                counts.num_unknown += 1
                continue
            same = answer is not None and strict is not None and same_answer(answer, strict)
            labels[slot] = ACCEPT if same else REJECT
            counts.num_harmless += same
            counts.num_harmful += not same
            astray = not same
        labelled.append(replace(window, labels=labels, correct=correct))
    return labelled, counts


class Oracle:
    """Accepts a mismatch exactly if the target, going on after it, gives the answer of strict decoding.

    It looks into the future, so no rule can be it; it says what there is to gain at no loss at all.
    """

    needs_draft_logits = False
    target_calls = 0  # what it looks up is not part of decoding

    def __init__(
        self, target: Target, strict_answers: Sequence[str | None], check: AnswerCheck, max_new_tokens: int
    ) -> None:
        """`strict_answers` are those of the rows of the call."""
        self._target = target
        self._strict = strict_answers
        self._check = check
        self._max_new_tokens = max_new_tokens

    def accepts(self, verification: Verification) -> Tensor:
        places = verification.mismatches.nonzero().tolist()
        context, drafts = verification.tokens.tolist(), verification.drafts.tolist()
        lengths, prompts = verification.context_lengths.tolist(), verification.prompt_lengths.tolist()
        prefixes = [context[row][-lengths[row] :] + drafts[row][: slot + 1] for row, slot in places]
        limits = [prompts[row] + self._max_new_tokens for row, _ in places]
        completions = complete(self._target, prefixes, limits, batch_size=max(len(prefixes), 1))
        texts = decode_texts(
            self._target,
            [
                prefix[prompts[row] :] + tokens
                for (row, _), prefix, tokens in zip(places, prefixes, completions, strict=True)
            ],
        )
        accepts = torch.zeros_like(verification.matches)
        for (row, slot), text in zip(places, texts, strict=True):
            answer, strict = self._check.extract(text), self._strict[verification.rows[row]]
            accepts[row, slot] = answer is not None and strict is not None and same_answer(answer, strict)
        return accepts
