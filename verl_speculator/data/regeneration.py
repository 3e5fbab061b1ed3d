"""The target's own answers in place of those in the data: what a drafter must learn to predict is the target.

Answers are kept as the tokens that the target wrote, and on disk as soon as a chat is finished; a run that was stopped
goes on where it stood.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from verl_speculator.base_model.files import fingerprint_base
from verl_speculator.data.backends import Backend, HuggingFaceBackend, Request
from verl_speculator.data.chats import read_chats
from verl_speculator.data.conversations import Conversation
from verl_speculator.data.finished_chats import ChatId, FinishedChats, Regenerated
from verl_speculator.data.token_rows import tokenizer_fingerprint
from verl_speculator.decoding import SamplingParams
from verl_speculator.errors import ConfigError, DataError


@dataclass(frozen=True)
class RegenerationSettings:
    """How answers are made. `temperature` above 0 samples, from `seed` on.

    Attributes:
        batch_size: Prompts at once, where the backend wants a number.
        num_samples: Answers to each chat.
        template_options: Of the chat template, such as `enable_thinking`.
        strict: A chat that the target's context does not hold is an error, and not left out.
    """

    max_new_tokens: int = 1024
    batch_size: int = 32
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    messages_key: str = "messages"
    num_samples: int = 1
    template_options: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "num_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.num_samples > 1 and self.sampling.is_greedy:
            raise ConfigError("--num-samples above 1 needs --temperature above 0: greedy answers are all the same")


@dataclass(frozen=True)
class Progress:
    """Chats done, those among them that an earlier run has done, and all; tokens written by this run."""

    done: int
    done_before: int
    total: int
    num_tokens: int


@dataclass(frozen=True)
class AnsweringBase:
    """Whose answers they are: as a user names it, and at which revision."""

    name: str
    revision: str | None = None


def regenerate_answers(
    model: Any,
    tokenizer: Any,
    files: Sequence[str | Path],
    output: Path,
    settings: RegenerationSettings,
    *,
    limit: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Regenerated:
    """`regenerate` with a Hugging Face model that is loaded; `report` is called with the chats done and all."""
    backend = HuggingFaceBackend(
        model,
        tokenizer,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        sampling=settings.sampling,
    )
    base = AnsweringBase(model.config._name_or_path, getattr(model.config, "_commit_hash", None))
    return regenerate(
        lambda conversations: answer(backend, tokenizer, conversations, settings),
        backend.name,
        base,
        tokenizer,
        files,
        output,
        settings,
        limit=limit,
        report=lambda progress: report(progress.done, progress.total),
    )


def regenerate(
    answer_all: Callable[[list[Conversation]], Iterator[Conversation]],
    backend: str,
    base: AnsweringBase,
    tokenizer: Any,
    files: Sequence[str | Path],
    output: Path,
    settings: RegenerationSettings,
    *,
    limit: int | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Regenerated:
    """Write the first `limit` chats of `files` to the parquet file `output` with all assistant turns by a base.

    Turns are answered in order, each after the base's own earlier answers; a chat that ends with a question gets its
    answer too. Rows keep their order; other columns are dropped. What an earlier call with the same base, settings and
    chats left unfinished is gone on with, whatever its backend.

    Args:
        answer_all: Gives the conversations back, in any order, as they are answered.
        backend: What answers, for the rows to say.

    Raises:
        DataError: A row that is not a list of messages, or has nothing to answer.
    """
    chats = read_chats([str(file) for file in files], settings.messages_key, limit)
    conversations = [
        Conversation.of(chat, row, sample) for row, chat in enumerate(chats) for sample in range(settings.num_samples)
    ]
    names: list[ChatId] = [(one.row, one.sample, one.digest()) for one in conversations]
    origin = _origin(base, tokenizer, settings)
    decisive = {**origin, "base": origin["base_fingerprint"] or base.name}  # a folder may have moved
    finished = FinishedChats(output, hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16])
    try:
        waiting = [one for one, name in zip(conversations, names, strict=True) if name not in finished]
        # Prompts of like length together need little padding; the longest first, so that running out of memory shows
        # early, and the last to end are short.
        waiting.sort(key=lambda one: -sum(len(str(turn.get("content"))) for turn in one.asked[0]))
        done = done_before = len(conversations) - len(waiting)
        num_tokens = 0
        answered = answer_all(waiting)
        # Only now that a model is loaded, for the time that is left.
        report(Progress(done, done_before, len(conversations), num_tokens))
        name_of = {(row, sample): (row, sample, digest) for row, sample, digest in names}
        for one in answered:
            finished.add(name_of[one.row, one.sample], one, backend)
            done, num_tokens = done + 1, num_tokens + one.num_tokens
            report(Progress(done, done_before, len(conversations), num_tokens))
    finally:
        finished.close()
    return finished.collect(names, settings.messages_key, tokenizer_fingerprint(tokenizer), origin)


def answer(
    backend: Backend, tokenizer: Any, conversations: Sequence[Conversation], settings: RegenerationSettings
) -> Iterator[Conversation]:
    """Answer all of them, turn by turn, with as many at work as the backend has use for; each as it is finished.

    Raises:
        DataError: A chat that does not fit into the context, if the settings are strict.
    """
    room = None if backend.context is None else backend.context - settings.max_new_tokens
    if room is not None and room < 1:
        raise ConfigError(
            f"--max-new-tokens={settings.max_new_tokens} leaves no room for a prompt in the {backend.context} "
            "positions of the base: lower it"
        )
    waiting, working, numbers = deque(conversations), dict[int, Conversation](), count()
    while waiting or working:
        while waiting and len(working) < backend.capacity:
            one = waiting.popleft()
            prompt = one.ask(tokenizer, settings.template_options, room)
            if prompt is not None:
                number = next(numbers)
                working[number] = one
                backend.submit(Request(number, prompt, _seed(settings.seed, one)))
                continue
            if settings.strict:
                raise DataError(
                    f"{one.where}, is too long for the {backend.context} positions of the base less "
                    f"--max-new-tokens={settings.max_new_tokens}: lower that, take other chats, or leave out --strict"
                )
            yield one
        for given in backend.finished() if working else ():
            one = working.pop(given.name)
            one.take(given.tokens, tokenizer, backend.stop_tokens)
            if one.asked:
                # Before new ones: what is finished is on disk.
                waiting.appendleft(one)
            else:
                yield one


def _seed(seed: int, one: Conversation) -> int:
    described = f"{seed} {one.row} {one.sample} {one.num_answers}"
    return int.from_bytes(hashlib.sha256(described.encode()).digest()[:4], "big")


def _origin(base: AnsweringBase, tokenizer: Any, settings: RegenerationSettings) -> dict[str, Any]:
    """What decides the answers, and says in each row how it came about."""
    template = tokenizer.chat_template
    return {
        "base": base.name,
        "revision": base.revision,
        "base_fingerprint": fingerprint_base(base.name),
        **asdict(settings.sampling),
        "seed": settings.seed,
        "max_new_tokens": settings.max_new_tokens,
        "template": hashlib.sha256(json.dumps(template).encode()).hexdigest()[:16],
        "template_options": dict(settings.template_options),
    }
