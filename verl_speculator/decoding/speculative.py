"""Reference decoding on a Hugging Face model: plain, and speculative with any drafter. The KV cache is kept.

Lossless, unless an acceptance rule is given: greedy tokens are those of plain greedy decoding, sampled ones have the
target's distribution. It exists to measure speculators and to check other implementations against, so it favours being
readable and exact over being fast.

One round feeds `[last token, k drafts]` to the target in one forward pass, keeps what it accepts and adds one token of
its own. Rows accept different numbers of drafts and go on from there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl_speculator.decoding.acceptance import AcceptanceRule, Relaxation
from verl_speculator.decoding.batch import Batch, Limits, Transcript
from verl_speculator.decoding.drafters import (
    Draft,
    Drafter,
    DraftSampling,
    GreedyDraftHead,
    StatefulDrafter,
    as_drafter,
)
from verl_speculator.decoding.results import DecodingResult
from verl_speculator.decoding.sampling import SamplingParams
from verl_speculator.decoding.target import Target
from verl_speculator.decoding.times import PhaseClock
from verl_speculator.decoding.verification import verify
from verl_speculator.errors import ConfigError, DataError
from verl_speculator.models import Speculator

GREEDY = SamplingParams()


def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    eos_token_id: int | Collection[int] | None = None,
    generator: torch.Generator | None = None,
) -> DecodingResult:
    """Plain decoding, one token per forward pass of the target; arguments as `speculative_generate`."""
    settings = _Settings(Limits(max_new_tokens, _stop_tokens(eos_token_id)), sampling, generator)
    return _decode(model, None, 0, input_ids, attention_mask, settings)


def speculative_generate(
    model: Any,
    drafter: GreedyDraftHead | Drafter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    num_draft_tokens: int | None = None,
    sampling: SamplingParams = GREEDY,
    draft_sampling: DraftSampling = "greedy",
    eos_token_id: int | Collection[int] | None = None,
    generator: torch.Generator | None = None,
    lossy_rule: AcceptanceRule | None = None,
) -> DecodingResult:
    """Decode with drafts of up to `num_draft_tokens` tokens (when not given, as many as the drafter can make).

    `model` is a Hugging Face causal model in eval mode; `input_ids` and `attention_mask` are `[B, S]`, padded on the
    left. Generation of a row ends with `eos_token_id` (one or several) or after `max_new_tokens`.

    `drafter` is a `Speculator` or another `Drafter` such as `NgramDrafter`. A speculator's drafts are its most likely
    tokens (`draft_sampling="greedy"`, vLLM's default) or are sampled with the same parameters as the target's
    ("random"); at temperature 0 that is the same. `generator`, on the model's device, makes sampling reproducible for
    the same batch.

    `lossy_rule` keeps drafts that the target would not have written: the output is then no longer the target's own.
    `decoding.rules` has some. The result says where that happened.

    Raises:
        ConfigError: a number of drafts that the drafter cannot make, a speculator of another base model, or a model
            whose past cannot take back a rejected token.
        DataError: prompts that are empty or not padded on the left.
    """
    if isinstance(drafter, Speculator):
        vocab_size, hidden_size = model.get_output_embeddings().weight.shape
        drafter.config.check_fits_base(hidden_size, vocab_size)
    keep_logits = lossy_rule is not None and lossy_rule.needs_draft_logits
    wrapped = as_drafter(drafter, sampling, draft_sampling, keep_logits=keep_logits)
    count = wrapped.max_draft_tokens if num_draft_tokens is None else num_draft_tokens
    if not 1 <= count <= wrapped.max_draft_tokens:
        raise ConfigError(
            f"num_draft_tokens={count} must be between 1 and {wrapped.max_draft_tokens}, "
            "the most that this drafter can make (n_predict of a speculator)."
        )
    settings = _Settings(Limits(max_new_tokens, _stop_tokens(eos_token_id)), sampling, generator, lossy_rule)
    return _decode(model, wrapped, count, input_ids, attention_mask, settings)


@dataclass(frozen=True)
class _Settings:
    limits: Limits
    sampling: SamplingParams
    generator: torch.Generator | None
    lossy_rule: AcceptanceRule | None = None

    def verify(self, draft: Draft, logits: Tensor, relax: Relaxation | None = None) -> tuple[Tensor, Tensor]:
        return verify(draft, logits, self.sampling, self.generator, relax)


@torch.inference_mode()
def _decode(
    model: Any,
    drafter: Drafter | None,
    num_draft_tokens: int,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    settings: _Settings,
) -> DecodingResult:
    input_ids, mask = _checked_prompts(input_ids, attention_mask)
    _check_settings(settings, input_ids.device)
    max_position = _max_position(model, input_ids.size(1) + settings.limits.max_new_tokens)
    clock = PhaseClock(input_ids.device)
    stateful = drafter if isinstance(drafter, StatefulDrafter) else None
    with Target(model, stateful.aux_hidden_state_layer_ids if stateful else ()) as target:
        hidden, logits = target.prefill(input_ids, mask)
        first, _ = settings.verify(Draft(input_ids[:, :0]), logits[:, None])
        transcript = Transcript(first[:, 0].tolist(), settings.limits)
        batch = Batch(target, torch.cat([input_ids, first], dim=1), hidden, mask.sum(-1).tolist())
        going_on = transcript.unfinished(batch.row_ids)
        if stateful:
            following = torch.cat([input_ids[:, 1:], first], dim=1)
            stateful.start(following, mask.sum(-1), target.take_aux())
            stateful.select(going_on)
        batch.keep(going_on)
        clock.lap("prefill")
        while batch.row_ids:
            draft = Draft(batch.no_drafts())
            if drafter is not None:
                draft = _trimmed(drafter.propose(batch.context(), num_draft_tokens, settings.generator))
                clock.lap("draft")
            hidden, logits = batch.forward(draft.tokens, max_position)
            relax = None
            if settings.lossy_rule is not None and draft.tokens.size(1):
                relax = Relaxation(settings.lossy_rule, batch, draft, hidden, logits, settings.limits.stop_tokens)
            tokens, accepted = settings.verify(draft, logits, relax)
            clock.lap("verify")
            kept = accepted.tolist()
            if relax is not None:
                # Before the round itself: it notes which of the tokens to come are nobody's choice but the rule's.
                for row, slots, calls in zip(batch.row_ids, relax.lossy_slots(kept), relax.calls(), strict=True):
                    transcript.add_lossy(row, slots, calls)
            for row, new, num_kept, num_drafted in zip(
                batch.row_ids, tokens.tolist(), kept, _lengths(draft), strict=True
            ):
                transcript.add_round(row, new, num_kept, num_drafted)
            going_on = transcript.unfinished(batch.row_ids)
            if stateful:
                stateful.advance(tokens, accepted + 1, target.take_aux())
                stateful.select(going_on)
            batch.advance(going_on, kept, tokens, hidden)
            clock.lap("other")
    return DecodingResult(
        transcript.tokens,
        target.num_forwards,
        num_draft_tokens,
        transcript.accepted,
        transcript.drafted,
        clock.times(),
        lossy_tokens=transcript.lossy if settings.lossy_rule is not None else None,
        scoring_calls=transcript.scoring_calls if settings.lossy_rule is not None else None,
    )


def _trimmed(draft: Draft) -> Draft:
    """Without the columns that no row proposes: where nobody proposes anything, the round is a plain step."""
    if draft.lengths is None:
        return draft
    width = int(draft.lengths.max())
    probabilities = None if draft.probabilities is None else draft.probabilities[:, :width]
    logits = None if draft.logits is None else draft.logits[:, :width]
    return Draft(draft.tokens[:, :width], draft.lengths, probabilities, logits)


def _lengths(draft: Draft) -> list[int]:
    batch, width = draft.tokens.shape
    return [width] * batch if draft.lengths is None else draft.lengths.tolist()


def _max_position(model: Any, end: int) -> int:
    """The last position to use: models with a table of positions have no more than their context."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 0
    return max(context, end) - 1


def _stop_tokens(eos_token_id: int | Collection[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def _check_settings(settings: _Settings, device: torch.device) -> None:
    if settings.limits.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={settings.limits.max_new_tokens} must be at least 1")
    if settings.generator is not None and settings.generator.device.type != device.type:
        raise ConfigError(
            f"generator is on {settings.generator.device} and must be on {device}, where input_ids are: "
            f'torch.Generator("{device.type}").'
        )


def _checked_prompts(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both without the columns that are padding in every row."""
    if input_ids.dim() != 2 or input_ids.size(0) == 0 or input_ids.size(1) == 0:
        raise DataError(f"input_ids must be [batch, length] with at least one token, got shape {list(input_ids.shape)}")
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise DataError(
            f"attention_mask {list(attention_mask.shape)} must have the shape of input_ids {list(input_ids.shape)}"
        )
    mask = attention_mask.long()
    if not bool(mask[:, -1].all()) or bool((mask.diff(dim=1) < 0).any()):
        raise DataError("prompts must be padded on the left: each row of attention_mask must be zeros, then ones")
    width = int(mask.sum(-1).max())
    return input_ids[:, -width:], mask[:, -width:]
