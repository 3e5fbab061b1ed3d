"""From prompts with checkable answers to windows: what the drafter proposes and the target would not have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_speculator.base_model.loading import Target
from verl_speculator.base_model.settings import read_quantization
from verl_speculator.data.chats import check_chat_file, read_chats
from verl_speculator.data.prompts import encode_chats, left_pad, split_by_length
from verl_speculator.decoding import Drafter, DraftModel, speculative_generate
from verl_speculator.decoding.acceptance import Verification
from verl_speculator.decoding.drafters import GreedyDraftHead
from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.models import Speculator
from verl_speculator.scorer.answers import AnswerCheck, check_answers, read_answers
from verl_speculator.scorer.config import DRAFT_SCALARS, SCALARS
from verl_speculator.scorer.features import draft_scalars
from verl_speculator.scorer.windows import UNKNOWN, Window

AnyDrafter = Drafter | GreedyDraftHead  # a speculator is the latter
Report = Callable[[str, int, int], None]  # what is being done, done so far, in all


@dataclass(frozen=True)
class Question:
    """A prompt as tokens, its text, and the reference answer."""

    tokens: list[int]
    text: str
    answer: str


def read_questions(
    files: Sequence[str],
    answers_key: str,
    target: Target,
    *,
    messages_key: str = "messages",
    limit: int | None = None,
    max_new_tokens: int,
) -> list[Question]:
    """The prompts of chat files that leave room for an answer, with what `answers_key` holds of each row.

    Raises:
        SpeculatorError: A file that holds no chats, or has no such column, or answers that are not there.
    """
    for file in files:
        check_chat_file(file, messages_key, "--data", column_key="--messages-key")
        check_answers(file, answers_key)
    answers = read_answers(files, answers_key)
    prompts = encode_chats(read_chats(files, messages_key, limit), target.tokenizer)
    context = getattr(target.model.config.get_text_config(), "max_position_embeddings", None)
    questions = []
    for prompt in split_by_length(prompts, context, max_new_tokens)[0]:
        answer = answers[prompt.chat.file, prompt.chat.row]
        questions.append(Question(prompt.prompt_ids, prompt.chat.request, answer))
    return questions


def load_drafter(
    folder: str, base: str, target: Target, num_drafts: int, quantization: Mapping[str, Any] | str | None = None
) -> AnyDrafter:
    """A speculator, or a language model with the target's tokens; the target's own weights where it is the same folder.

    `quantization`, of `LoadSettings`, is for a language model.

    Raises:
        SpeculatorError: It is neither, or its vocabulary is another.
    """
    if Path(folder).resolve() == Path(base).resolve():
        return DraftModel(target.model, num_drafts)
    from verl_speculator.models.serialization import find_folder

    try:
        speculator: Any = Speculator.from_pretrained(find_folder(folder), dtype=target.dtype, device=target.device)
        return speculator.eval()
    except CheckpointError:
        pass  # no speculator of ours: a language model is looked for
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=target.dtype,
            quantization_config=read_quantization(quantization),
            # Quantised weights are made where they stay.
            device_map=None if quantization is None else {"": target.device},
        )
        model = (model if quantization is not None else model.to(target.device)).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--draft: {folder!r} is neither a speculator nor a language model ({error})") from error
    sizes = [one.get_output_embeddings().weight.shape[0] for one in (model, target.model)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"--draft: {folder!r} has {sizes[0]} tokens and the target {sizes[1]}: a draft model must have the "
            "target's tokenizer"
        )
    return DraftModel(model, num_drafts)


@dataclass
class Recorder:
    """An acceptance rule that notes every round with a mismatch.

    It accepts nothing, so that decoding is strict, unless it is asked to explore: then it accepts each mismatch with a
    probability, and contexts are those that a scorer will see.
    """

    needs_draft_logits: bool
    explore: float = 0.0
    seed: int = 0
    rounds: list[list[dict[str, Any]]] = field(default_factory=list)  # per row of the call
    target_calls: int = 0

    def begin(self, num_rows: int, seed: int) -> None:
        self.rounds = [[] for _ in range(num_rows)]
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def scalars(self) -> tuple[str, ...]:
        return (*SCALARS, *DRAFT_SCALARS) if self.needs_draft_logits else SCALARS

    def accepts(self, verification: Verification) -> Tensor:
        scalars = draft_scalars(verification, self.scalars).tolist()
        usable = _usable_drafts(verification)
        mismatches = verification.mismatches.tolist()
        drafts, targets = verification.drafts.tolist(), verification.target_tokens.tolist()
        lengths, prompts = verification.context_lengths.tolist(), verification.prompt_lengths.tolist()
        context = verification.tokens.tolist()
        for place, row in enumerate(verification.rows):
            count = usable[place]
            if any(mismatches[place][:count]):
                self.rounds[row].append(
                    {
                        "input_ids": context[place][-lengths[place] :] + drafts[place][:count],
                        "draft_start_idx": lengths[place],
                        "prompt_length": prompts[place],
                        "target_ids": targets[place][: count + 1],
                        "scalars": scalars[place][:count],
                        "labels": [UNKNOWN] * count,
                        "correct": [UNKNOWN] * count,
                    }
                )
        drawn = torch.rand(verification.drafts.shape, generator=self._generator)
        return (drawn < self.explore).to(verification.drafts.device)


def _usable_drafts(verification: Verification) -> list[int]:
    """Per row, the drafts before the first that ends the text or takes the place of what would have."""
    ends = ~verification.drafted
    for token in verification.stop_tokens:
        ends = ends | (verification.drafts == token) | (verification.target_tokens[:, :-1] == token)
    return (~ends).long().cumprod(dim=1).sum(dim=1).tolist()


@dataclass
class WindowCounts:
    """What became of the prompts; none is dropped without being counted."""

    num_prompts: int = 0
    num_rounds: int = 0
    num_windows: int = 0
    num_rounds_without_mismatch: int = 0
    num_mismatches: int = 0
    num_strict_correct: int = 0
    num_unanswered: int = 0  # answers of strict decoding from which none could be extracted


def collect_windows(
    target: Target,
    drafter: AnyDrafter,
    questions: Sequence[Question],
    *,
    num_drafts: int,
    max_new_tokens: int,
    batch_size: int,
    check: AnswerCheck | None = None,
    explore: float = 0.0,
    seed: int = 0,
    report: Report = lambda doing, done, total: None,
) -> tuple[list[Window], tuple[str, ...], WindowCounts]:
    """Decode the questions greedily, and note every draft that differs from what the target would have written.

    Returns the windows, in the order of the questions, the names of their scalars, and counts. With `explore` the
    drafts' contexts are off the strict path; `strict_correct` and `strict_calls` are then those of that decoding.
    """
    check = check or AnswerCheck()
    can_compare = isinstance(drafter, DraftModel | Speculator)
    recorder = Recorder(needs_draft_logits=can_compare, explore=explore)
    found: dict[int, list[Window]] = {}
    counts = WindowCounts(num_prompts=len(questions))
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].tokens))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        recorder.begin(len(batch), seed + start)
        input_ids, mask = left_pad([questions[index].tokens for index in batch], target.tokenizer, target.device)
        result = speculative_generate(
            target.model,
            drafter,
            input_ids,
            mask,
            max_new_tokens=max_new_tokens,
            num_draft_tokens=num_drafts,
            eos_token_id=target.stop_tokens,
            lossy_rule=recorder,
        )
        texts = decode_texts(target, result.tokens)
        for row, index in enumerate(batch):
            correct = check.is_correct(texts[row], questions[index].answer)
            counts.num_unanswered += correct is None
            counts.num_strict_correct += bool(correct)
            counts.num_rounds += len(result.accepted_per_round[row])
            found[index] = [
                Window(
                    **noted,
                    prompt_index=index,
                    answer=questions[index].answer,
                    strict_correct=bool(correct),
                    strict_calls=result.target_calls[row],
                )
                for noted in recorder.rounds[row]
            ]
        report("Decoding", start + len(batch), len(order))
    windows = [window for index in range(len(questions)) for window in found[index]]
    counts.num_windows = len(windows)
    counts.num_rounds_without_mismatch = counts.num_rounds - len(windows)
    counts.num_mismatches = sum(len(window.mismatches) for window in windows)
    return windows, recorder.scalars, counts


def decode_texts(target: Target, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of answers, without the tokens that end them."""
    texts: list[str] = target.tokenizer.batch_decode(
        [[token for token in row if token not in target.stop_tokens] for row in rows], skip_special_tokens=True
    )
    return texts
