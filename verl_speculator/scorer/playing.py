"""The model's part of a rollout: scores of windows, and whole answers that the scorer itself decodes.

Both record what the scorer has seen of each mismatch. Where the target is frozen that is all its head ever reads, so a
training step needs the head alone and no further forward of the target; with LoRA the step reads the window again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from verl_speculator.decoding import speculative_generate
from verl_speculator.decoding.acceptance import Verification
from verl_speculator.decoding.drafters import Drafter
from verl_speculator.scorer.features import draft_scalars
from verl_speculator.scorer.model import ScoringActor


@dataclass(frozen=True)
class WindowTokens:
    """A window as the scorer reads it (`windows.Window`): contexts and drafts, and what the target made of these.

    Attributes:
        input_ids: Context and drafts.
        draft_start_idx: The length of the context.
        target_ids: At least one for each draft.
        scalars: One list for each draft.
    """

    input_ids: list[int]
    draft_start_idx: int
    target_ids: list[int]
    scalars: list[list[float]]

    @property
    def drafts(self) -> list[int]:
        return self.input_ids[self.draft_start_idx :]


@dataclass(frozen=True)
class Decision:
    """One mismatch that was decided on.

    Attributes:
        accepted: The action.
        score: The probability of accepting.
        features: [F], what the head read.
    """

    accepted: bool
    score: float
    features: Tensor


@dataclass
class Answer:
    """A decoded answer and all that led to it.

    Attributes:
        tokens: Of the answer, with the one that ended it.
        calls: Of models of the target's size, the prompt's included.
        rounds: Of drafts.
        accepted: Drafts that were kept.
        matched: Of these, those that matched.
        drafted: Drafts that there were.
        decisions: In the order in which they were taken.
        windows: With LoRA, each round with decisions: its window, and the slots of its decisions.
    """

    tokens: list[int] = field(default_factory=list)
    calls: int = 0
    rounds: int = 0
    accepted: int = 0
    matched: int = 0
    drafted: int = 0
    decisions: list[Decision] = field(default_factory=list)
    windows: list[tuple[WindowTokens, list[int]]] = field(default_factory=list)


def pad_windows(windows: Sequence[WindowTokens], num_scalars: int, device: Any) -> dict[str, Tensor]:
    """What `ScoringActor.forward` takes of a batch of windows, padded on the right."""
    width = max(len(window.input_ids) for window in windows)
    shape = (len(windows), width)
    tokens = {
        name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "target_ids")
    }
    scalars = torch.zeros(*shape, num_scalars)
    draft_mask = torch.zeros(shape, dtype=torch.bool)
    for row, window in enumerate(windows):
        start, end = window.draft_start_idx, len(window.input_ids)
        tokens["input_ids"][row, :end] = torch.tensor(window.input_ids)
        tokens["attention_mask"][row, :end] = 1
        tokens["target_ids"][row, start:end] = torch.tensor(window.target_ids[: end - start])
        scalars[row, start:end] = torch.tensor(window.scalars).reshape(end - start, num_scalars)
        draft_mask[row, start:end] = True
    tokens["position_ids"] = torch.arange(width).expand(shape)
    inputs = {**tokens, "scalars": scalars, "draft_mask": draft_mask}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@torch.no_grad()
def score_windows(
    actor: ScoringActor, windows: Sequence[WindowTokens], batch_size: int = 16
) -> list[tuple[Tensor, Tensor]]:
    """For each window the log odds of accepting `[k]` its drafts, and the features `[k, F]` that they follow from.

    One forward of the scorer. Log odds of drafts that match are large.
    """
    device = next(actor.head.parameters()).device
    num_scalars = len(actor.scoring_config.scalars)
    # Windows of like length together: less padding.
    order = sorted(range(len(windows)), key=lambda index: len(windows[index].input_ids))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    seen: list[Tensor] = []
    hook = actor.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            inputs = pad_windows([windows[index] for index in part], num_scalars, device)
            seen.clear()
            logits = actor(**inputs).logits
            for row, index in enumerate(part):
                drafts = inputs["draft_mask"][row]
                log_odds = logits[row, drafts].float().diff(dim=-1).squeeze(-1)
                # The head is asked from the second token on.
                features = seen[0][row, drafts[1:]]
                found[index] = (log_odds.cpu(), features.cpu().clone())
    finally:
        hook.remove()
    return [found[index] for index in range(len(windows))]


class RecordedDecisions:
    """An acceptance rule that asks the scorer, and remembers for each row what was decided on, and how.

    Args:
        actor: The scorer.
        num_rows: Rows of the call of decoding.
        temperature: Of the actions: log odds are divided by it.
        generator: Draws each action by its probability; None accepts by `threshold`.
        threshold: A mismatch is accepted from this score on, the score being the scorer's own (`score_tokens`).
    """

    def __init__(
        self,
        actor: ScoringActor,
        num_rows: int,
        *,
        temperature: float,
        generator: torch.Generator | None,
        threshold: float,
    ) -> None:
        self._actor, self._temperature = actor, temperature
        self._generator, self._threshold = generator, threshold
        self.answers = [Answer() for _ in range(num_rows)]

    @property
    def needs_draft_logits(self) -> bool:
        return self._actor.needs_draft_logits

    @property
    def target_calls(self) -> int:
        return self._actor.target_calls

    def accepts(self, verification: Verification) -> Tensor:
        mismatches = verification.mismatches
        features, log_odds = self._judge(verification)
        probability = (log_odds / self._temperature).sigmoid()
        if self._generator is None:
            accepts = (log_odds / self._actor.scoring_config.temperature).sigmoid() >= self._threshold
        else:
            uniform = torch.rand(probability.shape, generator=self._generator)
            accepts = uniform.to(probability.device) < probability
        kept, judged = verification.kept(accepts), verification.judged(accepts)
        matches, drafted = verification.matches, verification.drafted
        for place, row in enumerate(verification.rows):
            answer = self.answers[row]
            slots = judged[place].nonzero().flatten().tolist()
            for slot in slots:
                decision = Decision(
                    bool(accepts[place, slot]), float(probability[place, slot]), features[place, slot].cpu().clone()
                )
                answer.decisions.append(decision)
            answer.calls += 1 + (self.target_calls if bool(mismatches[place].any()) else 0)
            answer.rounds += 1
            answer.accepted += int(kept[place].sum())
            answer.matched += int((kept[place] & matches[place]).sum())
            answer.drafted += int(drafted[place].sum())
            if slots and self.target_calls:
                answer.windows.append((self._window(verification, place), slots))
        return accepts

    def _judge(self, verification: Verification) -> tuple[Tensor, Tensor]:
        """What the head reads of every slot `[B, k, F]`, and its log odds `[B, k]`."""
        seen: list[Tensor] = []
        hook = self._actor.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            log_odds = self._actor.decision_logits(verification).float().diff(dim=-1).squeeze(-1)
        finally:
            hook.remove()
        return seen[0], log_odds

    def _window(self, verification: Verification, place: int) -> WindowTokens:
        length, count = int(verification.context_lengths[place]), int(verification.lengths[place])
        context = verification.tokens[place, -length:]
        drafts = verification.drafts[place, :count]
        scalars = draft_scalars(verification, self._actor.scoring_config.scalars)[place, :count]
        return WindowTokens(
            torch.cat([context, drafts]).tolist(),
            length,
            verification.target_tokens[place, : count + 1].tolist(),
            scalars.tolist(),
        )


def play_answers(
    actor: ScoringActor,
    target: Any,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    *,
    stop_tokens: Sequence[int],
    max_new_tokens: int,
    num_draft_tokens: int | None,
    temperature: float,
    threshold: float,
    generator: torch.Generator | None,
) -> list[Answer]:
    """Decode an answer to each prompt, the scorer deciding on every mismatch: closed loop.

    Accepted drafts stand in the text that later decisions see, as they will when it is served; what a decision is worth
    shows in the answer as a whole.

    Args:
        actor: The scorer.
        target: The causal model that verifies.
        drafter: Drafts.
        prompts: Tokens of each.
        stop_tokens: End an answer.
        max_new_tokens: Cut it.
        num_draft_tokens: Of a round; None is as many as the drafter can make.
        temperature: See `RecordedDecisions`; so are the next two.
        threshold: Used where `generator` is None.
        generator: Of the actions.
    """
    rule = RecordedDecisions(actor, len(prompts), temperature=temperature, generator=generator, threshold=threshold)
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    result = speculative_generate(
        target,
        drafter,
        input_ids.to(target.device),
        mask.to(target.device),
        max_new_tokens=max_new_tokens,
        num_draft_tokens=num_draft_tokens,
        eos_token_id=stop_tokens,
        acceptance=rule,
    )
    for answer, tokens in zip(rule.answers, result.tokens, strict=True):
        answer.tokens = tokens
        answer.calls += 1  # the prompt's
    return rule.answers
