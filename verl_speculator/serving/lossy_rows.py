"""An acceptance rule of `decoding/` in vLLM: a mismatch that it accepts becomes the only choice of the target's row.

vLLM's sampler then keeps that draft as it keeps any other that the target would have written; none of its kernels is
touched. Lossy, and at work only where a speculative configuration asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.decoding.acceptance import AcceptanceRule, Verification
from verl_speculator.decoding.rules import parse_rule
from verl_speculator.errors import ConfigError
from verl_speculator.scorer.model import AutoModelForSPDScoring, read_config
from verl_speculator.scorer.rule import ScorerRule, check_rule, scorer_folders
from verl_speculator.serving.lossy_counter import LossyCounter

logger = logging.getLogger("vllm.verl_speculator")


@dataclass(frozen=True)
class VerifiedRows:
    """What vLLM has computed to verify a step's drafts: of B requests a row each, and one more for each draft.

    Attributes:
        tokens: [R], what each row has read: a request's last token, then its drafts.
        positions: [R], of these tokens.
        hidden_states: [R, H], what the base's forward returns.
        starts: [B], each request's first row.
        num_drafts: [B].
        prompt_lengths: [B].
        stop_tokens: [B, S], what ends each request; -1 fills up.
        is_lossy: [B], bool, where the rule is in force.
        invalid: [R], bool, drafts that vLLM will not keep whatever their row says; None for none.
        draft_logits: [B, k, V], where the rule compares with them.
    """

    tokens: Tensor
    positions: Tensor
    hidden_states: Tensor
    starts: Tensor
    num_drafts: Tensor
    prompt_lengths: Tensor
    stop_tokens: Tensor
    is_lossy: Tensor
    invalid: Tensor | None = None
    draft_logits: Tensor | None = None

    def with_draft_logits(self, logits: Tensor, rows: Tensor) -> VerifiedRows:
        """With those in `rows` [B] of `logits` [R', k, V]; -1 where they are gone, and the rule is not asked then."""
        return replace(self, draft_logits=logits[rows.clamp(min=0)], is_lossy=self.is_lossy & (rows >= 0))


class ServedRule:
    """A rule at work on the rows of a step, without waiting for the device."""

    def __init__(
        self,
        rule: AcceptanceRule,
        num_drafts: int,
        read_state: Callable[[Tensor], Tensor],
        counter: LossyCounter | None = None,
    ) -> None:
        """`read_state` leads from what the base's forward returns to what its `lm_head` reads."""
        self.rule = rule
        self.num_drafts = num_drafts
        self._read_state = read_state
        self._counter = counter

    @property
    def needs_draft_logits(self) -> bool:
        return self.rule.needs_draft_logits

    @torch.inference_mode()
    def apply(self, rows: VerifiedRows, logits: Tensor) -> None:
        """Change `logits` [R, V] in place where the rule keeps a draft that the target would not have written."""
        # shape: [B, k + 1]; past a request's drafts its last row again, which `lengths` hides
        index = rows.starts[:, None] + torch.minimum(
            torch.arange(self.num_drafts + 1, device=logits.device), rows.num_drafts[:, None]
        )
        verification = self._verification(rows, logits, index)
        drafts, own = verification.drafts, verification.target_tokens[:, :-1]
        # What a grammar, or anything else so far, has ruled out is not brought back.
        allowed = rows.is_lossy[:, None] & ~logits[index[:, :-1], drafts].isneginf()
        for stop in rows.stop_tokens.unbind(1):
            allowed &= (drafts != stop[:, None]) & (own != stop[:, None])
        if rows.invalid is not None:
            allowed &= ~rows.invalid[index[:, 1:]]
        kept = verification.kept(self.rule.accepts(verification) & allowed) & verification.mismatches
        if self._counter is not None:
            self._counter.add(kept.sum())
        chosen = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        chosen = chosen.index_add_(0, index[:, :-1].flatten(), kept.flatten().long())[:, None] > 0
        following = rows.tokens.roll(-1)[:, None].long()
        kept_logits = torch.where(chosen, 0, logits.gather(1, following))
        logits.masked_fill_(chosen, -torch.inf).scatter_(1, following, kept_logits)

    def _verification(self, rows: VerifiedRows, logits: Tensor, index: Tensor) -> Verification:
        drafts = rows.tokens[index[:, 1:]].long()
        # Where all requests have all drafts, which is the rule, nothing is copied.
        is_full = len(logits) == index.numel()
        states = self._read_state(rows.hidden_states)
        dense = logits.view(*index.shape, -1) if is_full else logits[index]
        target_tokens = dense.argmax(-1)
        context_lengths = rows.positions[rows.starts] + 1
        return Verification(
            tokens=rows.tokens[rows.starts][:, None].long(),
            context_lengths=context_lengths,
            prompt_lengths=rows.prompt_lengths,
            drafts=drafts,
            lengths=rows.num_drafts,
            target_tokens=target_tokens,
            logits=dense,
            hidden_states=states.view(*index.shape, -1) if is_full else states[index],
            draft_logits=rows.draft_logits,
            matches=drafts == target_tokens[:, :-1],
            # They differ from request to request, and are seen to in `apply`.
            stop_tokens=frozenset(),
            rows=list(range(len(index))),
        )


def check_served_rule(text: str, hidden_size: int) -> None:
    """Raise SpeculatorError for what is no rule, or cannot be served with a base of this hidden size."""
    check_rule(text)
    for folder in scorer_folders(text)[0]:
        config = read_config(folder)
        if config.lora_rank:
            raise ConfigError(
                f"the scorer {folder!r} has lora_rank={config.lora_rank}: it is a second model of the target's size, "
                "which vLLM does not run; serve one with lora_rank=0."
            )
        if config.hidden_size != hidden_size:
            raise ConfigError(
                f"the scorer {folder!r} was trained on hidden size {config.hidden_size} and the base model has "
                f"{hidden_size}: give the one that belongs to it."
            )


def load_served_rule(
    text: str, target_model: nn.Module, num_drafts: int, read_state: Callable[[Tensor], Tensor], device: torch.device
) -> ServedRule:
    """The rule that `text` names, which is not strict, for a base model of vLLM's; its groups of ranks must be there.

    Raises:
        SpeculatorError: A scorer's folder is not on this machine, or not usable.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    folders, threshold = scorer_folders(text)
    rule: AcceptanceRule | None
    if folders:
        backbone = _Embeddings(target_model)
        rule = ScorerRule(
            [AutoModelForSPDScoring.on_states(folder, backbone).to(device) for folder in folders], threshold
        )
    else:
        rule = parse_rule(text)
    assert rule is not None
    counter = None
    if get_tensor_model_parallel_rank() == 0:  # one rank says and counts it
        logger.warning("LOSSY: accept=%s keeps drafts that the base model would not have written.", text)
        counter = LossyCounter(device)
    return ServedRule(rule, num_drafts, read_state, counter)


class _Embeddings(nn.Module):
    """As much of a backbone as a scorer without LoRA reads: the embedding of a base model of vLLM's."""

    def __init__(self, target_model: nn.Module) -> None:
        super().__init__()
        model: Any = target_model
        self.config = model.config
        # A method, so that nothing of the base becomes a part of the scorer.
        self._embed = model.embed_input_ids

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        return self._embed
