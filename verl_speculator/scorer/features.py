"""What a mismatch is judged by.

All of it is known when the target has verified a draft: nothing here runs a model. Slot i is that of draft i; states
and logits [:, i] are those before the target reads it, [:, i + 1] those after (`decoding.acceptance.Verification`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from verl_speculator.decoding.acceptance import Verification
from verl_speculator.errors import ConfigError
from verl_speculator.scorer.config import DRAFT_SCALARS


def draft_scalars(verification: Verification, names: Sequence[str]) -> Tensor:
    """[B, k, len(names)], float32. With p the target's distribution at the slot, q the drafter's, d the draft:

    - `draft_logprob`, `target_logprob`: log p(d), and log p of the target's own token;
    - `margin`: the target's largest logit less that of the draft;
    - `entropy`: of p, in nats;
    - `rank`: log(1 + how many tokens are more likely than d);
    - `position`: log(1 + tokens of the answer before the slot);
    - `following_matches`: how many of the drafts after this one match without a break, the target having read d;
    - `following_drafts`: how many there are;
    - `kl`: KL(p ‖ q) in nats; `draft_confidence`: log q(d). These two need the drafter's logits.

    Raises:
        ConfigError: `kl` or `draft_confidence` of a drafter whose logits are not at hand.
    """
    missing = [name for name in names if name in DRAFT_SCALARS]
    if missing and verification.draft_logits is None:
        raise ConfigError(f"the scorer reads {missing[0]!r}, and this drafter does not say how likely its tokens are")
    drafts = verification.drafts[..., None]
    logits = verification.logits[:, :-1].float()
    log_p = logits.log_softmax(-1)
    draft_logit = logits.gather(-1, drafts)
    columns: dict[str, Tensor] = {
        "draft_logprob": log_p.gather(-1, drafts).squeeze(-1),
        "target_logprob": log_p.amax(-1),
        "margin": logits.amax(-1) - draft_logit.squeeze(-1),
        "entropy": -(log_p.exp() * log_p).nan_to_num().sum(-1),
        "rank": (logits > draft_logit).sum(-1).float().log1p(),
        "position": verification.positions.float().log1p(),
        "following_matches": _following_matches(verification).float(),
        "following_drafts": (verification.lengths[:, None] - 1 - _slots(verification)).clamp(min=0).float(),
    }
    if verification.draft_logits is not None:
        log_q = verification.draft_logits.float().log_softmax(-1)
        columns["kl"] = (log_p.exp() * (log_p - log_q)).nan_to_num().sum(-1)
        columns["draft_confidence"] = log_q.gather(-1, drafts).squeeze(-1)
    if not names:
        return logits.new_empty(*verification.drafts.shape, 0)
    return torch.stack([columns[name] for name in names], dim=-1)


def head_features(
    hidden_states: Tensor,
    matches: Tensor,
    drafted: Tensor,
    target_embeddings: Tensor,
    scalars: Tensor,
    *,
    lookahead: int,
    use_states: bool,
) -> Tensor:
    """What `ScoreHead` reads of each slot, [B, k, num_features].

    In this order: the state before the draft, the state after it, the embedding of the target's token; for each of the
    next `lookahead` drafts the state after it, whether there is one, and whether it matches; the scalars. What lies
    past the last draft is 0.

    Args:
        hidden_states: [B, k + 1, H].
        matches: [B, k], bool.
        drafted: [B, k], bool.
        target_embeddings: [B, k, H], of the token that the target would have written.
        scalars: [B, k, S].
    """
    parts = [hidden_states[:, :-1], hidden_states[:, 1:], target_embeddings] if use_states else []
    seen = drafted
    for step in range(1, lookahead + 1):
        # Lookahead ends with the draft: after a slot without one, another text may stand in a packed batch.
        seen = seen & _shifted(drafted, step)
        flags = torch.stack([seen, seen & _shifted(matches, step)], dim=-1).to(scalars.dtype)
        if use_states:
            parts.append(_shifted(hidden_states[:, 1:], step) * seen[..., None])
        parts.append(flags)
    return torch.cat([*parts, scalars], dim=-1)


def _shifted(values: Tensor, step: int) -> Tensor:
    """`values [B, k, ...]` of the slot `step` further on; zeros past the end."""
    width = values.size(1)
    gone = torch.zeros_like(values[:, : min(step, width)])
    return torch.cat([values[:, step:], gone], dim=1)


def _following_matches(verification: Verification) -> Tensor:
    run = torch.zeros_like(verification.lengths)
    columns = []
    matches = verification.matches & verification.drafted
    for slot in reversed(range(matches.size(1))):
        columns.append(run)
        run = torch.where(matches[:, slot], run + 1, 0)
    return torch.stack(columns[::-1], dim=1) if columns else matches.long()


def _slots(verification: Verification) -> Tensor:
    return torch.arange(verification.drafts.size(1), device=verification.drafts.device)
