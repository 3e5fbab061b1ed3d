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
from dataclasses import replace
from typing import Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from torch import Tensor
from verl.utils import tensordict_utils as tu

from verl_speculator.scorer.completion import Completions
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.controllers import Controllers
from verl_speculator.scorer.playing import PlayedAnswer
from verl_speculator.scorer.settings import OWN_SCORE, RewardSettings, RolloutSettings
from verl_speculator.scorer.spd_dataset import window_of
from verl_speculator.scorer.spd_samples import (
    Actions,
    Sample,
    answer_sequences,
    decide,
    kept_drafts,
    reward_input,
    rollout_metrics,
    row_fields,
)
from verl_speculator.scorer.windows import UNKNOWN, Window


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

    def set_decoding(self, config: ScoringModelConfig) -> None:
        """What validation and the next checkpoint's scorer decide by."""
        self._workers.set_decoding(self.controllers.threshold, config.score_mean, config.score_scale)

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
        if is_validation:
            self.tell_decoding()
        roll_out = self._play if self._settings.closed_loop else self._sample_windows
        samples = roll_out([row for row in rows for _ in range(repeats)], repeats, seed)
        self.score(samples)
        part = "val" if is_validation else "train"
        if not is_validation:
            self._adjust(samples)
        self._metrics[part] = rollout_metrics(samples, self._client.controllers)
        self._put(samples, repeats, part, step)

    def tell_decoding(self) -> None:
        """Let the workers know by what they decide from now on, where nothing is drawn."""
        self._scoring = self._normalised()
        self._client.set_decoding(self._scoring)

    def _normalised(self) -> ScoringModelConfig:
        """The scorer's configuration with the statistics as they are now."""
        if not self._settings.score_momentum:
            return self._scoring
        now = self._client.controllers
        return replace(self._scoring, score_mean=now.score_mean, score_scale=now.score_scale)

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
        drawn = log_odds / self._rollout.temperature
        scores = (self._scoring.normalise(log_odds) if generator is None else drawn).sigmoid()
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
        decisions = (decision for answer in answers for decision in answer.decisions)
        dtype = next((decision.features.dtype for decision in decisions), torch.float32)
        return [
            Sample(
                prompt=row,
                sequences=answer_sequences(prompt, answer, self._scoring, temperature, dtype),
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
        # Actions are drawn by these, and by nothing that is normalised: the policy is the head alone.
        log_odds = torch.tensor(scores, dtype=torch.float64).logit(1e-12) * self._rollout.temperature
        self._client.controllers.update_statistics(self._settings, log_odds.tolist())
        if self._settings.score_momentum:
            scores = self._normalised().normalise(log_odds).sigmoid().tolist()
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
        dtype=dtype,
        device="cpu" if on_cpu else "auto",
        trust_remote_code=config.model.trust_remote_code,
        quantization=None if on_cpu else dict(config.model.quantization) or None,
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
