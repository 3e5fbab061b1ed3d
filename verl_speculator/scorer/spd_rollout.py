"""verl's rollout of a scorer: actions on windows or in whole answers, their rewards, and rows for GRPO.

**Windows.** One forward of the actor gives the probability of accepting each mismatch, and `n` samples of a window draw
their actions from it. Matches are accepted. What trains are the mismatches up to and with the first reject: what comes
after it was not decided on.

**Closed loop.** Each of `n` samples decodes a whole answer, drawing every decision; all decisions of an answer, in
order, are one sequence of actions with the answer's reward. A row needs no text for that: a frozen target's features
of each decision are those that verification has computed, so they stand in the row, and an update of verl's runs the
head on them. Text with rejected drafts beside it would be the same policy gradient, but rejected drafts branch off, and
a forward over branches needs an attention mask that neither flash attention nor packed batches have. With LoRA states
change with the weights; an answer is then several rows, one for each round that decided on something, which share one
session of verl's: the advantage is that of the answer and counts for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from torch import Tensor
from verl import DataProto
from verl.utils import tensordict_utils as tu

from verl_speculator.scorer.completion import Completions
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.controllers import Controllers
from verl_speculator.scorer.playing import PlayedAnswer
from verl_speculator.scorer.settings import OWN_SCORE, RewardSettings, RolloutSettings
from verl_speculator.scorer.spd_dataset import window_of
from verl_speculator.scorer.windows import UNKNOWN, Window


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


class ScorerClient:
    """The actor's workers, as the rollout calls them; it takes the place of verl's language model server."""

    def __init__(self, workers: Any, controllers: Controllers) -> None:
        self._workers, self.controllers = workers, controllers
        self.scoring_config: ScoringModelConfig = workers.scoring_config()[0]

    def score_windows(self, windows: Sequence[Window]) -> list[tuple[Tensor, Tensor]]:
        return self._call("score_windows", "window", windows, "scored")

    def play_answers(
        self, prompts: Sequence[list[int]], temperature: float, threshold: float, seed: int | None
    ) -> list[PlayedAnswer]:
        return self._call(
            "play_answers", "prompt", prompts, "answer", temperature=temperature, threshold=threshold, seed=seed
        )

    def _call(self, method: str, name: str, rows: Sequence[Any], wanted: str, **values: Any) -> list[Any]:
        # verl cuts a batch into equal parts.
        missing = -len(rows) % self._workers.world_size
        filled = [*rows, *rows[:1] * missing]
        data = TensorDict({name: NonTensorStack(*map(NonTensorData, filled))}, batch_size=len(filled))
        for key, value in values.items():
            tu.assign_non_tensor_data(data, key, value)
        result = getattr(self._workers, method)(data)
        return [getattr(row, "data", row) for row in result[wanted]][: len(rows)]


class SPDRollout:
    """What verl's trainer calls an agent loop manager. Made by `create`, it fills verl's TransferQueue.

    Args:
        config: verl's whole configuration.
        llm_client: Of the actor.
        reward_loop_worker_handles: verl's reward workers.
        start_completions: Gives what finishes the answers of windows, when there is one whose answer nobody knows.
    """

    def __init__(
        self,
        config: Any,
        llm_client: ScorerClient,
        reward_loop_worker_handles: list[Any],
        start_completions: Callable[[], Completions],
    ) -> None:
        self._client, self._reward_workers = llm_client, reward_loop_worker_handles
        self._start_completions = start_completions
        self._completions: Completions | None = None
        self._rollout = config.actor_rollout_ref.rollout
        self._settings, self._reward = RolloutSettings.of(config.actor_rollout_ref), RewardSettings.of(config)
        function = config.reward.custom_reward_function
        # What a window's data says of an answer is what our own function says.
        self._needs_every_text = (function.path, function.name) != OWN_SCORE
        self._scoring = llm_client.scoring_config
        self._metrics: dict[str, dict[str, float]] = {}

    @classmethod
    def create(
        cls,
        config: Any,
        llm_client: ScorerClient,
        teacher_client: Any = None,
        reward_loop_worker_handles: list[Any] | None = None,
    ) -> SPDRollout:
        return cls(
            config, llm_client, reward_loop_worker_handles or [], lambda: start_completions(config.actor_rollout_ref)
        )

    def generate_sequences(self, batch: TensorDict) -> None:
        """Roll out a batch of the dataset's rows and put the result into the TransferQueue."""
        is_validation = bool(tu.get(batch, "validate", False))
        step = int(tu.get(batch, "global_steps"))
        rows = _rows(batch)
        repeats = self._rollout.val_kwargs.n if is_validation else self._rollout.n
        # A stream of its own for each step: a run that is resumed draws what it would have drawn.
        seed = None if is_validation else (self._rollout.seed * 1_000_003 + step) % 2**62
        roll_out = self._play if self._settings.closed_loop else self._sample_windows
        samples = roll_out([row for row in rows for _ in range(repeats)], repeats, seed)
        self.score(samples)
        part = "val" if is_validation else "train"
        if not is_validation:
            self._adjust(samples)
        self._metrics[part] = rollout_metrics(samples, self._client.controllers)
        self._put(samples, repeats, part, step)

    def take_metrics(self, part: str) -> dict[str, float]:
        """Those of the last batch of `part`, "train" or "val"."""
        prefix = "scorer" if part == "train" else "val-scorer"
        return {f"{prefix}/{name}": value for name, value in self._metrics.get(part, {}).items()}

    def _sample_windows(self, rows: list[dict[str, Any]], repeats: int, seed: int | None) -> list[Sample]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        windows = [window_of(row, self._scoring.scalars) for row in rows[::repeats]]
        scored = self._client.score_windows(windows)
        samples = [
            self._sample_window(row, windows[place // repeats], *scored[place // repeats], generator)
            for place, row in enumerate(rows)
        ]
        self._finish([sample for sample in samples if sample.answer is not None])
        return samples

    def _sample_window(
        self,
        row: dict[str, Any],
        window: Window,
        log_odds: Tensor,
        features: Tensor,
        generator: torch.Generator | None,
    ) -> Sample:
        drafts, targets = torch.tensor(window.drafts), torch.tensor(window.target_ids)
        mismatches = drafts != targets[: len(drafts)]
        temperature = self._scoring.temperature if generator is None else self._rollout.temperature
        scores = (log_odds / temperature).sigmoid()
        accepts, mask = decide(scores, mismatches, generator, self._client.controllers.threshold)
        kept, strict = kept_drafts(accepts), kept_drafts(~mismatches)
        context = window.input_ids[: window.draft_start_idx]
        inputs = {"features": features.flatten()}
        if self._scoring.lora_rank:
            inputs = {"target_ids": targets, "scalars": torch.tensor(window.scalars).flatten()}
        text = context + window.drafts[:kept] + window.target_ids[kept : kept + 1]
        accepted = (mask & accepts).nonzero().flatten().tolist()
        # After the last mismatch that was accepted the target goes on by itself, as it did when that one was labelled.
        known = window.correct[accepted[-1]] if accepted else int(window.strict_correct)
        return Sample(
            prompt=row,
            sequences=[Actions(accepts, mask, torch.where(mismatches, scores, 1.0), context, inputs, drafts)],
            answer=text if known == UNKNOWN or self._needs_every_text else None,
            episode={
                "correct": known == 1,
                "strict_correct": window.strict_correct,
                "accepted": kept,
                "strict_accepted": strict,
                "drafted": len(drafts),
                # Per token: a call gives one more than it keeps.
                "calls": 1 / (kept + 1),
                "strict_calls": 1 / (strict + 1),
                "mismatches": int(mask.sum()),
                "accepted_mismatches": len(accepted),
                "context": text,
            },
            tokens=kept + 1,
            rounds=1,
            calls=1,
        )

    def _finish(self, samples: list[Sample]) -> None:
        """Put the whole answer in the place of the text that a window has led to."""
        if samples:
            if self._completions is None:
                self._completions = self._start_completions()
            texts = [sample.answer or [] for sample in samples]
            lengths = [int(sample.prompt["prompt_length"]) for sample in samples]
            for sample, answer in zip(samples, self._completions.answers(texts, lengths), strict=True):
                sample.answer = answer

    def _play(self, rows: list[dict[str, Any]], repeats: int, seed: int | None) -> list[Sample]:
        windows = [window_of(row, ()) for row in rows]
        prompts = [window.input_ids[: window.prompt_length] for window in windows]
        temperature, threshold = self._rollout.temperature, self._client.controllers.threshold
        answers = self._client.play_answers(prompts, temperature, threshold, seed)
        return [
            Sample(
                prompt=row,
                sequences=answer_sequences(prompt, answer, self._scoring, temperature),
                answer=answer.tokens,
                episode={
                    "correct": False,
                    "strict_correct": bool(row["strict_correct"]),
                    "accepted": answer.accepted,
                    "strict_accepted": answer.accepted - sum(decision.accepted for decision in answer.decisions),
                    "drafted": answer.drafted,
                    "calls": answer.calls,
                    "strict_calls": int(row["strict_calls"]),
                    "mismatches": len(answer.decisions),
                    "accepted_mismatches": sum(decision.accepted for decision in answer.decisions),
                    "context": prompt + answer.tokens,
                },
                tokens=len(answer.tokens),
                rounds=answer.rounds,
                calls=answer.calls,
            )
            for row, prompt, answer in zip(rows, prompts, answers, strict=True)
        ]

    def score(self, samples: list[Sample]) -> None:
        """Ask verl's reward workers, which hold `SPDRewardManager`."""
        price = self._client.controllers.cost_price
        parts = [samples[start :: len(self._reward_workers)] for start in range(len(self._reward_workers))]
        asked = [
            worker.compute_score_batch.remote(reward_input(part, price))
            for worker, part in zip(self._reward_workers, parts, strict=True)
            if part
        ]
        for part, given in zip(parts, ray.get(asked), strict=False):
            for sample, result in zip(part, given, strict=True):
                sample.reward, sample.info = result["reward_score"], result["reward_extra_info"]

    def _adjust(self, samples: list[Sample]) -> None:
        count = len(samples)
        accuracy = sum(sample.info["correct"] for sample in samples) / count
        strict_accuracy = sum(sample.info["strict_correct"] for sample in samples) / count
        self._client.controllers.update_price(self._reward, accuracy, strict_accuracy)
        scores = [
            float(score)
            for sample in samples
            for actions in sample.sequences
            for score in actions.scores[actions.mask.bool()]
        ]
        self._client.controllers.update_threshold(self._settings, scores)

    def _put(self, samples: list[Sample], repeats: int, part: str, step: int) -> None:
        keys: list[str] = []
        fields: list[dict[str, Any]] = []
        tags: list[dict[str, Any]] = []
        for place, sample in enumerate(samples):
            for index, actions in enumerate(sample.sequences):
                keys.append(f"{sample.prompt['uid']}_{place % repeats}_{index}")
                fields.append(row_fields(sample, actions))
                lengths = {"prompt_len": len(actions.context), "response_len": len(actions.accepts)}
                tags.append(
                    {
                        "status": "success",
                        **lengths,
                        "seq_len": sum(lengths.values()),
                        "place": len(tags),
                        "global_steps": step,
                        "min_global_steps": step,
                        "max_global_steps": step,
                    }
                )
        tq.kv_batch_put(keys=keys, fields=tu.list_of_dict_to_tensordict(fields), tags=tags, partition_id=part)
        uids = list(dict.fromkeys(sample.prompt["uid"] for sample in samples))
        tq.kv_batch_put(keys=uids, tags=[{"status": "finished"}] * len(uids), partition_id=part)


def answer_sequences(
    prompt: list[int], answer: PlayedAnswer, config: ScoringModelConfig, temperature: float
) -> list[Actions]:
    """The decisions of an answer as sequences: one with features; with LoRA one for each round that decided.

    An answer without decisions is one forced action that does not count: its reward is part of the group's mean.
    """
    one = torch.ones(1, dtype=torch.long)
    accepts = torch.tensor([int(decision.accepted) for decision in answer.decisions])
    scores = (torch.tensor([decision.log_odds for decision in answer.decisions]) / temperature).sigmoid()
    if not answer.decisions:
        inputs = {"features": torch.zeros(config.num_features)}
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


def start_completions(config: Any) -> Completions:
    """Start the process of Ray's that finishes answers; all of the run shares it.

    Args:
        config: verl's `actor_rollout_ref`.
    """
    from verl_speculator.base_model.settings import LoadSettings
    from verl_speculator.scorer.completion import CompletionServer

    settings = RolloutSettings.of(config)
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.actor.fsdp_config.model_dtype]
    on_cpu = settings.completion.num_gpus == 0
    load = LoadSettings(
        dtype=dtype, device="cpu" if on_cpu else "auto", trust_remote_code=config.model.trust_remote_code
    )
    # A fraction of a CPU, as Ray counts them: it must also start where every CPU has been given away.
    server = ray.remote(CompletionServer).options(num_cpus=0.01, num_gpus=settings.completion.num_gpus)
    handle = server.remote(settings, load)
    complete: Callable[[list[list[int]]], list[list[int]]] = lambda texts: ray.get(handle.complete.remote(texts))  # noqa: E731
    return Completions(complete, ray.get(handle.stop_tokens.remote()), settings.max_new_tokens)


def _rows(batch: TensorDict) -> list[dict[str, Any]]:
    """The rows of a batch; what is of the whole batch is in none of them."""
    fields = {name: batch.get(name) for name in batch.keys()}  # noqa: SIM118 - not a dictionary
    fields = {name: values for name, values in fields.items() if not isinstance(values, NonTensorData)}
    return [
        {
            name: row if isinstance(row := values[place], Tensor) else getattr(row, "data", row)
            for name, values in fields.items()
        }
        for place in range(len(batch))
    ]


def _objects(rows: dict[str, list[Any]]) -> dict[str, Any]:
    import numpy as np

    return {name: np.fromiter(values, dtype=object, count=len(values)) for name, values in rows.items()}
