"""verl's actor worker with a scorer's two ways of rolling out. Importing it registers the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_speculator.platforms import cpu
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.data import load_drafter
from verl_speculator.scorer.playing import play_answers, score_windows
from verl_speculator.scorer.settings import RolloutSettings
from verl_speculator.scorer.spd_engine import SPDScorerEngine

DEFAULT_DRAFTS = 4  # of a draft model, which could go on for ever


class SPDTrainingWorker(TrainingWorker):
    def __init__(self, config: Any) -> None:
        if cpu.is_active():
            cpu.init_process_group()
        super().__init__(config)


class SPDActorWorker(ActorRolloutRefWorker):
    """Everything that verl's actor worker does, on a scorer; no rollout server, since the actor rolls out itself."""

    actor_worker_cls = SPDTrainingWorker
    ref_worker_cls = SPDTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        super().init_model()
        self.engine: SPDScorerEngine = self.actor.engine
        self.settings = settings = RolloutSettings.of(self.config)
        self.engine.learns_threshold = settings.threshold.mode == "learned"
        if settings.closed_loop:
            assert settings.draft_model_path is not None
            self.drafter: Any = load_drafter(
                settings.draft_model_path,
                settings.target_model_path,
                self.engine.target,
                settings.num_draft_tokens or DEFAULT_DRAFTS,
                dict(self.config.model.quantization) or None,
            )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def scoring_config(self) -> ScoringModelConfig:
        return self.engine.actor.scoring_config

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def score_windows(self, data: TensorDict) -> TensorDict:
        """`scored`, what `playing.score_windows` gives, for each `window`; features only where a step reads them."""
        self.engine.actor.eval()
        windows = _rows(data, "window")
        scored = score_windows(self.engine.actor, windows)
        mismatched = [
            features[slot] for window, (_, features) in zip(windows, scored, strict=True) for slot in window.mismatches
        ]
        # A fresh head says the same of every mismatch, whatever the scale of what it reads.
        self._standardise(mismatched)
        if self.engine.actor.scoring_config.lora_rank:
            scored = [(log_odds, features[:, :0]) for log_odds, features in scored]
        return TensorDict({"scored": NonTensorStack(*map(NonTensorData, scored))}, batch_size=len(data))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def play_answers(self, data: TensorDict) -> TensorDict:
        """`answer`, what `playing.play_answers` gives, for each `prompt`; without `seed` the threshold decides."""
        seed, temperature, threshold = (tu.get(data, key) for key in ("seed", "temperature", "threshold"))
        self.engine.actor.eval()
        generator = None
        if seed is not None:
            generator = torch.Generator().manual_seed(seed + self.engine.get_data_parallel_rank())
        answers = play_answers(
            self.engine.actor,
            self.engine.target,
            self.drafter,
            _rows(data, "prompt"),
            max_new_tokens=self.settings.max_new_tokens,
            num_draft_tokens=self.settings.num_draft_tokens,
            temperature=temperature,
            threshold=threshold,
            generator=generator,
        )
        self._standardise([decision.features for answer in answers for decision in answer.decisions])
        if self.engine.actor.scoring_config.lora_rank:
            for answer in answers:
                answer.decisions = [replace(decision, features=torch.empty(0)) for decision in answer.decisions]
        return TensorDict({"answer": NonTensorStack(*map(NonTensorData, answers))}, batch_size=len(data))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_decoding(self, threshold: float, score_mean: float, score_scale: float) -> None:
        """What validation and the next checkpoint's scorer decide by."""
        self.engine.threshold = threshold
        actor = self.engine.actor
        actor.scoring_config = replace(actor.scoring_config, score_mean=score_mean, score_scale=score_scale)

    def _standardise(self, features: list[torch.Tensor]) -> None:
        width = self.engine.actor.scoring_config.num_features
        self.engine.standardise(torch.stack(features) if features else torch.zeros(0, width))


def _rows(data: TensorDict, key: str) -> list[Any]:
    return [getattr(row, "data", row) for row in data[key]]
