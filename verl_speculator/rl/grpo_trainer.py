"""verl's synchronous trainer with what the rollout accepted of its drafts. Checked on verl 0.9.1 and vLLM 0.28.

Importing this registers the trainer; `GRPOTaskRunner`, the driver's process, is what imports it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_speculator.platforms import cpu
from verl_speculator.rl.grpo_config import TRAINER
from verl_speculator.rl.rollout_metrics import Counters, read_counters, rollout_metrics
from verl_speculator.trainer.metrics_log import MetricsLog


class PolicyTrainingWorker(TrainingWorker):
    def __init__(self, config: Any) -> None:
        if cpu.is_active():
            cpu.init_process_group()
        super().__init__(config)


class PolicyWorker(ActorRolloutRefWorker):
    """verl's worker of actor, rollout and reference, on any device."""

    actor_worker_cls = PolicyTrainingWorker
    ref_worker_cls = PolicyTrainingWorker


@register_trainer(TRAINER)
class GRPOTrainer(PPOTrainerSync):
    """Beside verl's metrics: vLLM's own counters of a step, how far the policy has gone, and `metrics.jsonl`."""

    role_worker_mapping: dict[Any, Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._rollout: dict[str, float] = {}

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # the one of verl's kinds that it is
        return super()._build_replay_buffer()

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        self.role_worker_mapping = {
            role: ray.remote(PolicyTrainingWorker if role == Role.Critic else PolicyWorker)
            for role in self.role_worker_mapping
        }

    def prepare_step(self) -> dict[str, float]:
        self._before, self._began = self._counters(), time.monotonic()
        return super().prepare_step()

    def on_sample_end(self) -> None:
        seconds = time.monotonic() - self._began
        self._rollout = rollout_metrics(self._before, self._counters(), seconds)
        super().on_sample_end()

    def _counters(self) -> Counters:
        servers = [replica.server_handle for replica in self.llm_server_manager.get_replicas()]
        return sum(ray.get([server.__ray_call__.remote(read_counters) for server in servers]), Counters())

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        metrics.update(self._rollout)
        if self.use_reference_policy:
            metrics["rollout/kl_to_first_policy"] = _kl_to_reference(batch)
        self._log.append(self.global_steps, metrics)

    def fit(self, agent_loop_manager: Any) -> None:
        self._log = MetricsLog(self.config.trainer.default_local_dir, self.global_steps)
        try:
            super().fit(agent_loop_manager)
        finally:
            self._log.close()


def _kl_to_reference(batch: KVBatchMeta) -> float:
    """KL(π_t‖π_0) per token of the rollouts, by the estimator r - 1 - log r with r = π_0/π_t (Schulman 2020)."""
    fields = ["old_log_probs", "ref_log_prob", "response_mask"]
    data: Mapping[str, Any] = tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
    ).to_padded_tensor()
    mask = data["response_mask"].bool()
    log_ratio = (data["ref_log_prob"] - data["old_log_probs"])[mask].double()
    return float(torch.mean(log_ratio.exp() - 1 - log_ratio))


class GRPOTaskRunner(TaskRunnerV1.__ray_actor_class__):
    """verl's task runner, in a process that knows of this trainer."""
