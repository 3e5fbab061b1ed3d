"""The model's part of a rollout: scores of windows, and whole answers that the scorer itself decodes.

Both record what the scorer has seen of each mismatch. Where the target is frozen that is all its head ever reads, so a
training step needs the head alone and no further forward of the target; with LoRA the step reads the window again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from verl_speculator.base_model.loading import Target
from verl_speculator.data.prompts import left_pad
from verl_speculator.decoding import Drafter, speculative_generate
from verl_speculator.decoding.acceptance import Verification
from verl_speculator.decoding.drafters import GreedyDraftHead
from verl_speculator.scorer.features import draft_scalars
from verl_speculator.scorer.model import ScoringActor
from verl_speculator.scorer.supervised import window_features
from verl_speculator.scorer.windows import UNKNOWN, Window


@dataclass(frozen=True)
class Decision:
    """One mismatch that was decided on.

    Attributes:
        accepted: The action.
        log_odds: Of accepting.
        features: [F], what the head read.
    """

    accepted: bool
    log_odds: float
    features: Tensor


@dataclass
class PlayedAnswer:
    """A decoded answer and all that led to it.

    Attributes:
        tokens: Of the answer, with the one that ended it.
        calls: Of models of the target's size, the prompt's included.
        rounds: Of drafts.
        accepted: Drafts that were kept.
        drafted: Drafts that there were.
        decisions: In the order in which they were taken.
        windows: With LoRA, each round with decisions: its window, and the slots of its decisions.
    """

    tokens: list[int] = field(default_factory=list)
    calls: int = 0
    rounds: int = 0
    accepted: int = 0
    drafted: int = 0
    decisions: list[Decision] = field(default_factory=list)
    windows: list[tuple[Window, list[int]]] = field(default_factory=list)


@torch.no_grad()
def score_windows(actor: ScoringActor, windows: Sequence[Window], batch_size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """For each window the log odds `[k]` of accepting its drafts, and the features `[k, F]` that they follow from.

    One forward of the scorer's backbone; what is said of drafts that match has no meaning.

    Args:
        actor: The scorer.
        windows: With the scalars that the scorer reads, in its order.
        batch_size: Windows of a forward.
    """
    columns = range(len(actor.scoring_config.scalars))
    # Windows of like length together: less padding.
    order = sorted(range(len(windows)), key=lambda index: len(windows[index].input_ids))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for start in range(0, len(order), batch_size):
        part = [windows[index] for index in order[start : start + batch_size]]
        features, _ = window_features(actor, part, columns, actor.head.shift.device)
        log_odds = actor.head(features).diff(dim=-1).squeeze(-1).cpu()
        features = features.cpu()
        for row, index in enumerate(order[start : start + batch_size]):
            count = len(windows[index].drafts)
            found[index] = (log_odds[row, :count].clone(), features[row, :count].clone())
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
        self.answers = [PlayedAnswer() for _ in range(num_rows)]

    @property
    def needs_draft_logits(self) -> bool:
        return self._actor.needs_draft_logits

    @property
    def target_calls(self) -> int:
        return self._actor.target_calls

    def accepts(self, verification: Verification) -> Tensor:
        seen: list[Tensor] = []
        hook = self._actor.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            log_odds = self._actor.decision_logits(verification).diff(dim=-1).squeeze(-1)
        finally:
            hook.remove()
        if self._generator is None:
            accepts = self._actor.scoring_config.normalise(log_odds).sigmoid() >= self._threshold
        else:
            drawn = torch.rand(log_odds.shape, generator=self._generator).to(log_odds.device)
            accepts = drawn < (log_odds / self._temperature).sigmoid()
        judged = verification.judged(accepts)
        for place, row in enumerate(verification.rows):
            slots = judged[place].nonzero().flatten().tolist()
            for slot in slots:
                decision = Decision(
                    bool(accepts[place, slot]), float(log_odds[place, slot]), seen[0][place, slot].cpu().clone()
                )
                self.answers[row].decisions.append(decision)
            if slots and self.target_calls:
                self.answers[row].windows.append((self._window(verification, place), slots))
        return accepts

    def _window(self, verification: Verification, place: int) -> Window:
        length, count = int(verification.context_lengths[place]), int(verification.lengths[place])
        tokens = torch.cat([verification.tokens[place, -length:], verification.drafts[place, :count]])
        scalars = draft_scalars(verification, self._actor.scoring_config.scalars)[place, :count]
        return Window(
            input_ids=tokens.tolist(),
            draft_start_idx=length,
            prompt_length=int(verification.prompt_lengths[place]),
            target_ids=verification.target_tokens[place, : count + 1].tolist(),
            scalars=scalars.tolist(),
            prompt_index=-1,
            answer="",
            strict_correct=False,
            strict_calls=0,
            labels=[UNKNOWN] * count,
            correct=[UNKNOWN] * count,
        )


def play_answers(
    actor: ScoringActor,
    target: Target,
    drafter: GreedyDraftHead | Drafter,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    num_draft_tokens: int | None,
    temperature: float = 1.0,
    threshold: float = 0.5,
    generator: torch.Generator | None = None,
) -> list[PlayedAnswer]:
    """Decode an answer to each prompt, the scorer deciding on every mismatch: closed loop.

    Accepted drafts stand in the text that later decisions see, as they will when it is served; what a decision is worth
    shows in the answer as a whole.

    Args:
        actor: The scorer.
        target: Verifies.
        drafter: Drafts.
        prompts: Tokens of each.
        max_new_tokens: Cut an answer.
        num_draft_tokens: Of a round; None is as many as the drafter can make.
        temperature: See `RecordedDecisions`; so are the next two.
        threshold: Used where `generator` is None.
        generator: Of the actions.
    """
    rule = RecordedDecisions(actor, len(prompts), temperature=temperature, generator=generator, threshold=threshold)
    input_ids, mask = left_pad(prompts, target.tokenizer, target.device)
    result = speculative_generate(
        target.model,
        drafter,
        input_ids,
        mask,
        max_new_tokens=max_new_tokens,
        num_draft_tokens=num_draft_tokens,
        eos_token_id=target.stop_tokens,
        lossy_rule=rule,
    )
    assert result.drafted_per_round is not None
    for row, answer in enumerate(rule.answers):
        answer.tokens, answer.calls = result.tokens[row], result.target_calls[row]
        answer.rounds = len(result.accepted_per_round[row])
        answer.accepted, answer.drafted = sum(result.accepted_per_round[row]), sum(result.drafted_per_round[row])
    return rule.answers
