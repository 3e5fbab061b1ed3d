"""verl's actor worker with a scorer's two ways of rolling out. Importing it registers the engine."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_speculator.decoding.drafters import Drafter
from verl_speculator.platforms import cpu
from verl_speculator.scorer.playing import Answer, WindowTokens, play_answers, score_windows
from verl_speculator.scorer.settings import RolloutSettings
from verl_speculator.scorer.spd_engine import SPDScorerEngine


class SPDTrainingWorker(TrainingWorker):
    def __init__(self, config: Any) -> None:
        if cpu.is_active():
            cpu.init_process_group()
        super().__init__(config)


class SpeculativeDecodingRollout:
    """Draft, verify, score, and draw or compare with the threshold; whole answers, on one rank.

    Args:
        engine: With the scorer and its target.
        settings: Of the rollout.
        drafter: Drafts in whole answers; windows have their drafts.
    """

    def __init__(self, engine: SPDScorerEngine, settings: RolloutSettings, drafter: Drafter | None) -> None:
        self.engine, self.settings, self._drafter = engine, settings, drafter

    def score(self, windows: list[WindowTokens]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`playing.score_windows`, with features only where a training step reads them."""
        self.engine.actor.eval()
        scored = score_windows(self.engine.actor, windows)
        mismatched = [
            features[slot]
            for window, (_, features) in zip(windows, scored, strict=True)
            for slot, draft in enumerate(window.drafts)
            if draft != window.target_ids[slot]
        ]
        self._standardise(mismatched)
        return [(log_odds, features if self._keeps_features else features[:, :0]) for log_odds, features in scored]

    def play(
        self, prompts: list[list[int]], temperature: float, threshold: float, seed: int | None
    ) -> list[Answer]:
        """`playing.play_answers`; `seed` None decides by the threshold."""
        assert self._drafter is not None
        self.engine.actor.eval()
        answers = play_answers(
            self.engine.actor,
            self.engine.target.model,
            self._drafter,
            prompts,
            stop_tokens=self.engine.target.stop_tokens,
            max_new_tokens=self.settings.max_new_tokens,
            num_draft_tokens=self.settings.num_draft_tokens,
            temperature=temperature,
            threshold=threshold,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
        )
        self._standardise([decision.features for answer in answers for decision in answer.decisions])
        return answers

    @property
    def _keeps_features(self) -> bool:
        return self.engine.actor.scoring_config.lora_rank == 0

    def _standardise(self, features: list[torch.Tensor]) -> None:
        width = self.engine.actor.scoring_config.num_features
        self.engine.standardise(torch.stack(features) if features else torch.zeros(0, width))


class SPDActorWorker(ActorRolloutRefWorker):
    """Everything that verl's actor worker does, on a scorer; no rollout server, since the actor rolls out itself."""

    actor_worker_cls = SPDTrainingWorker
    ref_worker_cls = SPDTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        super().init_model()
        engine = self.actor.engine
        settings = RolloutSettings.of(self.config)
        engine.learns_threshold = settings.threshold.mode == "learned"
        drafter = load_drafter(settings, engine) if settings.closed_loop else None
        self.playing = SpeculativeDecodingRollout(engine, settings, drafter)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def score_windows(self, data: TensorDict) -> TensorDict:
        """`scored`, a row's log odds and features, for `window`."""
        scored = self.playing.score(_rows(data, "window"))
        return TensorDict({"scored": NonTensorStack(*scored)}, batch_size=len(data))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def play_answers(self, data: TensorDict) -> TensorDict:
        """`answer` for `prompt`; `seed`, or None, and `threshold` are of the whole batch."""
        seed = tu.get(data, "seed")
        if seed is not None:
            seed += self.actor.engine.get_data_parallel_rank()
        temperature, threshold = tu.get(data, "temperature"), tu.get(data, "threshold")
        answers = self.playing.play(_rows(data, "prompt"), temperature, threshold, seed)
        return TensorDict({"answer": NonTensorStack(*answers)}, batch_size=len(data))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_threshold(self, threshold: float) -> None:
        """The threshold that the next checkpoint's scorer has."""
        self.actor.engine.threshold = threshold


def _rows(data: TensorDict, key: str) -> list[Any]:
    return [getattr(row, "data", row) for row in data[key]]
