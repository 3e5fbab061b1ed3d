"""What answers prompts: an engine that takes requests, and gives answers as they are finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from verl_speculator.base_model.loading import stop_tokens
from verl_speculator.data.prompts import left_pad
from verl_speculator.decoding import SamplingParams, generate


@dataclass(frozen=True)
class Request:
    """`seed` is that of this answer alone, so that it does not depend on what is asked at the same time."""

    name: int
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Answer:
    """`tokens` end with the one that ended the answer, if it was not cut."""

    name: int  # of its request
    tokens: list[int]


class Backend(Protocol):
    """
    Attributes:
        name: What rows say of how they came about.
        capacity: Requests that it has use for at a time.
        context: Positions of a prompt and its answer together; None if there is no limit.
        stop_tokens: End an answer.
    """

    name: str
    capacity: int
    context: int | None
    stop_tokens: frozenset[int]

    def submit(self, request: Request) -> None: ...

    def finished(self) -> list[Answer]:
        """Answers that were not given yet, of at least one of the requests; waits for it."""


class HuggingFaceBackend:
    """A model of transformers, which answers all waiting requests as one batch."""

    name = "hf"

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, max_new_tokens: int, sampling: SamplingParams
    ) -> None:
        self.capacity = batch_size
        self.context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.stop_tokens = frozenset(stop_tokens(model, tokenizer))
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._waiting: list[Request] = []

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def finished(self) -> list[Answer]:
        requests, self._waiting = self._waiting, []
        device = self._model.device
        # Sampling shares one stream of random numbers: the same batch is answered the same.
        generator = torch.Generator(device=device).manual_seed(
            hash(tuple(request.seed for request in requests)) % 2**63
        )
        result = generate(
            self._model,
            *left_pad([request.prompt_ids for request in requests], self._tokenizer, device),
            max_new_tokens=self._max_new_tokens,
            sampling=self._sampling,
            eos_token_id=self.stop_tokens,
            generator=None if self._sampling.is_greedy else generator,
        )
        return [Answer(request.name, tokens) for request, tokens in zip(requests, result.tokens, strict=True)]
