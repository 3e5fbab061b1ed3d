"""What a rollout of the scorer decided, and what becomes of it: rows for GRPO, input for rewards, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl import DataProto

from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.controllers import Controllers
from verl_speculator.scorer.playing import PlayedAnswer
from verl_speculator.scorer.windows import Window


@dataclass(frozen=True)
class Actions:
    """Decisions of one sequence: a row of the batch that an update trains on.

    Attributes:
        accepts: [D], 1 or 0.
        mask: [D], 1 where a mismatch was decided on.
        scores: [D], the probability of accepting.
        context: Tokens before, for those who read a log.
        inputs: What the engine reads: `features` [D * F], or `target_ids` and `scalars` of a window whose drafts follow
            the context.
        drafts: D tokens, those of a window; else anything.
    """

    accepts: Tensor
    mask: Tensor
    scores: Tensor
    context: list[int]
    inputs: dict[str, Tensor]
    drafts: Tensor

    @property
    def log_probs(self) -> Tensor:
        chosen = torch.where(self.accepts.bool(), self.scores, 1 - self.scores)
        # A match is accepted for sure.
        return torch.where(self.mask.bool(), chosen.clamp(min=1e-30).log(), 0.0)


@dataclass
class Sample:
    """A window or an answer as it was decided.

    Attributes:
        prompt: The dataset's row.
        sequences: At least one.
        answer: Tokens of the answer; None where it is known whether it is right.
        episode: What `SPDRewardManager` wants to know beside it.
        tokens: That target calls have given.
        rounds: Of drafts.
        calls: Of the target.
        reward: What came of it.
        info: And what the reward manager says about it.
    """

    prompt: dict[str, Any]
    sequences: list[Actions]
    answer: list[int] | None
    episode: dict[str, Any]
    tokens: int
    rounds: int
    calls: int
    reward: float = 0.0
    info: dict[str, float] = field(default_factory=dict)


def decide(
    scores: Tensor, mismatches: Tensor, generator: torch.Generator | None, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Actions [k] and mask [k] of a window whose drafts have these scores [k].

    Matches are accepted; the mask has the mismatches up to and with the first reject. `generator` None accepts from the
    threshold on.
    """
    wanted = scores >= threshold if generator is None else torch.rand(scores.shape, generator=generator) < scores
    accepts = wanted | ~mismatches
    before = torch.cat([torch.ones(1, dtype=torch.bool), accepts[:-1]]).long().cumprod(0).bool()
    return accepts.long(), (mismatches & before).long()


def kept_drafts(accepts: Tensor) -> int:
    """Those before the first reject."""
    return int(accepts.long().cumprod(0).sum())


def answer_sequences(
    prompt: list[int],
    answer: PlayedAnswer,
    config: ScoringModelConfig,
    temperature: float,
    dtype: torch.dtype = torch.float32,
) -> list[Actions]:
    """The decisions of an answer as sequences: one with features; with LoRA one for each round that decided.

    An answer without decisions is one forced action that does not count: its reward is part of the group's mean. Its
    features are zeros of the type `dtype` that those of other answers have.
    """
    one = torch.ones(1, dtype=torch.long)
    accepts = torch.tensor([int(decision.accepted) for decision in answer.decisions])
    scores = (torch.tensor([decision.log_odds for decision in answer.decisions]) / temperature).sigmoid()
    if not answer.decisions:
        inputs = {"features": torch.zeros(config.num_features, dtype=dtype)}
        if config.lora_rank:
            inputs = {"target_ids": one, "scalars": torch.zeros(len(config.scalars))}
        return [Actions(one, 0 * one, torch.ones(1), prompt, inputs, one)]
    if not config.lora_rank:
        features = torch.stack([decision.features for decision in answer.decisions]).clone()
        return [Actions(accepts, torch.ones_like(accepts), scores, prompt, {"features": features.flatten()}, accepts)]
    sequences, done = [], 0
    for window, slots in answer.windows:
        taken = slice(done, done + len(slots))
        sequences.append(_window_actions(window, slots, accepts[taken], scores[taken]))
        done += len(slots)
    return sequences


def _window_actions(window: Window, slots: list[int], accepts: Tensor, scores: Tensor) -> Actions:
    count = len(window.drafts)
    all_accepts, all_scores = torch.ones(count, dtype=torch.long), torch.ones(count)
    mask = torch.zeros_like(all_accepts)
    all_accepts[slots], mask[slots], all_scores[slots] = accepts, 1, scores
    inputs = {"target_ids": torch.tensor(window.target_ids), "scalars": torch.tensor(window.scalars).flatten()}
    context = window.input_ids[: window.draft_start_idx]
    return Actions(all_accepts, mask, all_scores, context, inputs, torch.tensor(window.drafts))


def row_fields(sample: Sample, actions: Actions) -> dict[str, Any]:
    """A row as verl's trainer and the engine read it; `rm_scores` has the reward at the end."""
    prompt = torch.tensor(actions.context)
    rewards = torch.zeros(len(actions.accepts))
    rewards[-1] = sample.reward
    return {
        "uid": sample.prompt["uid"],
        "prompts": prompt,
        "responses": actions.accepts,
        "input_ids": torch.cat([prompt, actions.drafts]),
        "position_ids": torch.arange(len(prompt) + len(actions.drafts)),
        "response_mask": actions.mask,
        "loss_mask": actions.mask,
        "rollout_log_probs": actions.log_probs,
        "rm_scores": rewards,
        "num_turns": 1,
        "data_source": sample.prompt["data_source"],
        "reward_model": sample.prompt["reward_model"],
        "extra_info": sample.prompt["extra_info"],
        "extra_fields": {"reward_extra_info": sample.info},
        **actions.inputs,
    }


def reward_input(samples: Sequence[Sample], cost_price: float) -> DataProto:
    """What `SPDRewardManager.run_single` reads, a row for each sample."""
    rows: dict[str, list[Any]] = {
        "episode": [{**sample.episode, "answer": sample.answer, "cost_price": cost_price} for sample in samples],
        **{name: [sample.prompt[name] for sample in samples] for name in ("data_source", "reward_model", "extra_info")},
    }
    return DataProto.from_dict(tensors={"place": torch.arange(len(samples))}, non_tensors=_objects(rows))


def rollout_metrics(samples: Sequence[Sample], controllers: Controllers) -> dict[str, float]:
    """Of one batch: what the scorer does, what it gains and what it costs."""
    total = {name: sum(sample.info[name] for sample in samples) for name in samples[0].info}
    count = len(samples)
    lossy = [sample for sample in samples if sample.info["accepted_mismatches"]]
    harmed = sum(sample.info["strict_correct"] > sample.info["correct"] for sample in lossy)
    metrics = {
        "mismatch_accept_rate": total["accepted_mismatches"] / max(total["mismatches"], 1),
        "accepted_length": 1 + total["accepted"] / max(sum(sample.rounds for sample in samples), 1),
        "tokens_per_target_call": sum(sample.tokens for sample in samples) / sum(sample.calls for sample in samples),
        "accuracy": total["correct"] / count,
        "strict_accuracy": total["strict_correct"] / count,
        "harmful_accept_rate": harmed / max(len(lossy), 1),
        "unextracted_rate": 1 - total["extracted"] / count,
        "without_decision_rate": sum(not sample.info["mismatches"] for sample in samples) / count,
        "cost": total["calls"] / max(total["strict_calls"], 1e-9),
        "equals_strict": float(total["accepted_mismatches"] == 0),
        "reward": sum(sample.reward for sample in samples) / count,
        "cost_price": controllers.cost_price,
        "threshold": controllers.threshold,
    }
    for name in (name for name in total if name.startswith("reward_")):
        metrics[name] = total[name] / count
    for correct in (1, 0):
        for strict in (1, 0):
            case = [s for s in samples if (s.info["correct"], s.info["strict_correct"]) == (correct, strict)]
            name = f"{'right' if correct else 'wrong'}_{'right' if strict else 'wrong'}"
            metrics[f"case_rate/{name}"] = len(case) / count
            if case:
                metrics[f"case_reward/{name}"] = sum(sample.reward for sample in case) / len(case)
    return metrics


def _objects(rows: dict[str, list[Any]]) -> dict[str, Any]:
    return {name: np.fromiter(values, dtype=object, count=len(values)) for name, values in rows.items()}
