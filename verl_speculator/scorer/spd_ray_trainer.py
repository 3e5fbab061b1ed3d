"""verl's trainer of the V1 kind on a scorer. Checked on verl 0.9.1.

The actor rolls out itself, so there is no rollout server and no weights to send. Importing this registers trainer and
reward manager; `SPDTaskRunner`, the driver's process, is what imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from transfer_queue import KVBatchMeta
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from verl_speculator.scorer.controllers import Controllers
from verl_speculator.scorer.settings import RewardSettings, RolloutSettings
from verl_speculator.scorer.spd_rollout import ScorerClient, SPDRollout
from verl_speculator.scorer.spd_worker import SPDActorWorker
from verl_speculator.trainer.metrics_log import MetricsLog

NAME = "spd"

RolloutReplicaRegistry.register(NAME, lambda: RolloutReplica)  # looked up and never started


@register_trainer(NAME)
class SPDRayTrainer(PPOTrainer):
    """GRPO on a scorer's actions."""

    agent_loop_manager: SPDRollout

    def __init__(self, config: Any) -> None:
        self._enable_hybrid_replicas = False
        self.controllers = Controllers.start(RewardSettings.of(config), RolloutSettings.of(config.actor_rollout_ref))
        super().__init__(config)

    @property
    def ref_in_actor(self) -> bool:
        """The actor keeps the policy that it has started from, a head: no second copy of the target for the KL."""
        return True

    @ref_in_actor.setter
    def ref_in_actor(self, value: bool) -> None:
        """verl would have it only with LoRA."""

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # the one of verl's kinds that it is
        return super()._build_replay_buffer()

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        self.role_worker_mapping.pop(Role.RefPolicy, None)
        self.role_worker_mapping[Role.Actor] = ray.remote(SPDActorWorker)

    def get_llm_client(self) -> ScorerClient:
        return ScorerClient(self.actor_rollout_wg, self.controllers)

    def prepare_step(self) -> dict[str, float]:
        super().prepare_step()
        return self.agent_loop_manager.take_metrics("train")

    def _balance_batch(self, batch: KVBatchMeta, metrics: Any, **kwargs: Any) -> KVBatchMeta:
        # As they were drawn, whatever their random names: the same batch is summed up in the same order again.
        batch.reorder(sorted(range(len(batch.tags)), key=lambda row: batch.tags[row]["place"]))
        return super()._balance_batch(batch, metrics, **kwargs)

    def _validate(self) -> dict[str, float]:
        metrics = super()._validate() | self.agent_loop_manager.take_metrics("val")
        if metrics["val-scorer/equals_strict"]:
            print(
                "FAILURE equals_strict: the scorer rejects every mismatch of the validation data, so decoding with it "
                "is strict decoding and gains nothing; lower the price of errors, raise actor.entropy_coeff, or start "
                "from a supervised head"
            )
        return metrics

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        self._log.append(self.global_steps, metrics)

    def on_step_end(self) -> None:
        """No weights to send."""

    def on_sample_end(self) -> None:
        """No server to put to sleep."""

    def fit(self, agent_loop_manager: Any) -> None:
        self._log = MetricsLog(self.config.trainer.default_local_dir, self.global_steps)
        try:
            super().fit(agent_loop_manager)
        finally:
            self._log.close()

    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        # Before verl's own, which ends with the file that makes the checkpoint count.
        self.controllers.save(folder)
        self.agent_loop_manager.tell_decoding()
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            mode, given = self.config.trainer.resume_mode, self.config.trainer.resume_from_path
            folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
            self.controllers.load(Path(given) if mode == "resume_path" else folder)


class SPDTaskRunner(TaskRunnerV1.__ray_actor_class__):
    """verl's task runner, in a process that knows of this trainer."""
