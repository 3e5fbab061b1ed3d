"""Finishing answers: what the target goes on to say, greedily, after a window's accepted drafts.

The answers come from one process of Ray's. A window with M mismatches has at most M + 1 outcomes, and each is finished
once in a run, however often it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from verl_speculator.base_model.loading import load_target, read_stop_tokens
from verl_speculator.base_model.settings import LoadSettings
from verl_speculator.data.backends import Backend, HuggingFaceBackend, Request
from verl_speculator.data.vllm_backend import VllmBackend
from verl_speculator.decoding import SamplingParams
from verl_speculator.errors import DataError
from verl_speculator.scorer.settings import RolloutSettings


class CompletionServer:
    """A target that finishes texts. Under Ray it is the class of an actor."""

    def __init__(self, settings: RolloutSettings, load: LoadSettings) -> None:
        from transformers import AutoTokenizer

        path = settings.target_model_path
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=load.trust_remote_code)
        how: dict[str, Any] = {
            "batch_size": settings.completion.batch_size,
            "max_new_tokens": settings.max_new_tokens,
            "sampling": SamplingParams(),
        }
        self._backend: Backend
        if settings.completion.backend == "vllm":
            self._backend = VllmBackend(path, load, read_stop_tokens(path, load, tokenizer), **how)
        else:
            self._backend = HuggingFaceBackend(load_target(path, load, tokenizer).model, tokenizer, **how)

    def complete(self, texts: Sequence[list[int]]) -> list[list[int]]:
        """What follows each text, with the token that ends it."""
        # Long ones first, and like beside like: each batch is padded to its longest.
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        found: dict[int, list[int]] = {}
        waiting = 0
        for index in order:
            self._backend.submit(Request(index, texts[index], 0))
            waiting += 1
            if waiting == self._backend.capacity:
                waiting -= self._take(found)
        while waiting:
            waiting -= self._take(found)
        return [found[index] for index in range(len(texts))]

    def _take(self, found: dict[int, list[int]]) -> int:
        answers = self._backend.finished()
        found.update({answer.name: answer.tokens for answer in answers})
        return len(answers)

    def stop_tokens(self) -> frozenset[int]:
        return self._backend.stop_tokens


class Completions:
    """Finished answers, each text once.

    Args:
        complete: What finishes texts: `CompletionServer.complete`, here or in another process.
        stop_tokens: After one of these nothing follows.
        max_new_tokens: Where an answer is cut, its accepted drafts included.
    """

    def __init__(
        self,
        complete: Callable[[list[list[int]]], list[list[int]]],
        stop_tokens: frozenset[int],
        max_new_tokens: int,
    ) -> None:
        self._complete, self._stop_tokens, self._max_new_tokens = complete, stop_tokens, max_new_tokens
        self._known: dict[tuple[int, ...], list[int]] = {}

    def answers(self, texts: Sequence[list[int]], prompt_lengths: Sequence[int]) -> list[list[int]]:
        """The whole answer of each text, what the text has of it included.

        Raises:
            DataError: A text that is shorter than its prompt.
        """
        for text, length in zip(texts, prompt_lengths, strict=True):
            if len(text) < length:
                raise DataError(f"a window of {len(text)} tokens is shorter than its prompt of {length}")
        open_texts = [
            text
            for text, length in zip(texts, prompt_lengths, strict=True)
            if tuple(text) not in self._known
            and len(text) - length < self._max_new_tokens
            and text[-1] not in self._stop_tokens
        ]
        new = [list(text) for text in dict.fromkeys(map(tuple, open_texts))]
        if new:
            self._known.update(zip(map(tuple, new), self._complete(new), strict=True))
        return [
            (text[length:] + self._known.get(tuple(text), []))[: self._max_new_tokens]
            for text, length in zip(texts, prompt_lengths, strict=True)
        ]
