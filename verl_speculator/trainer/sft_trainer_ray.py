"""Training under Ray: `python -m verl_speculator.trainer.sft_trainer_ray trainer.n_gpus_per_node=N key=value ...`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import ray
from omegaconf import DictConfig
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.sft_trainer_ray import SFTTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from verl_speculator.platforms import cpu
from verl_speculator.trainer.checkpoints import RunCheckpoints
from verl_speculator.trainer.config.devices import apply_device
from verl_speculator.trainer.config.rules import data_parallel_size
from verl_speculator.trainer.entry import run_trainer
from verl_speculator.trainer.launch import joins_cluster
from verl_speculator.trainer.loop import SpeculatorTrainingLoop
from verl_speculator.trainer.processes import RayDriver
from verl_speculator.trainer.sft_trainer import base_loss
from verl_speculator.trainer.worker import SpeculatorTrainingWorker


class SpeculatorSFTRayTrainer(SpeculatorTrainingLoop, SFTTrainer):
    """A driver that loads the data, and a group of Ray workers that each hold an engine."""

    def _build_dataloader(self) -> None:
        super()._build_dataloader()
        self._plan_steps()

    def _build_engine(self) -> None:
        trainer = self.config.trainer
        self.model_config.speculator.update(self.chosen_draft_vocabulary())
        # One worker to a device: verl reserves a CPU for every worker that may share it.
        pool = RayResourcePool(process_on_nodes=[trainer.n_gpus_per_node] * trainer.nnodes, max_colocate_count=1)
        worker = RayClassWithInitArgs(ray.remote(SpeculatorTrainingWorker), config=self.worker_config())
        options = {}
        if self.start_profile_step != -1:
            options["profile_steps"] = list(range(self.start_profile_step, self.end_profile_step + 1))
        self.training_client = RayWorkerGroup(
            resource_pool=pool, ray_cls_with_init=worker, device_name=trainer.device, **options
        )
        self.training_client.set_loss_fn(loss_fn=base_loss)
        self.processes = RayDriver(self.training_client)
        # Now, since the model is not loaded before `reset`.
        self.ckpt_handler = RunCheckpoints(self.config, self.training_client, self.processes)
        self._load_model()

    def _build_ckpt_handler(self) -> None:
        """Built with the engine."""

    def data_shard(self) -> tuple[int, int]:
        return 0, 1

    def data_parallel_size(self) -> int:
        workers = self.config.trainer.n_gpus_per_node * self.config.trainer.nnodes
        return data_parallel_size(self.config, workers)

    def is_logging(self) -> bool:
        return True

    def train_batch(self, batch: Any) -> dict[str, Any] | None:
        if self.config.trainer.balance_batch:
            batch = tu.index_select_tensor_dict(batch, self._balanced_order(batch["input_ids"]))
        return tu.get(self.training_client.train_batch(batch).get(), "metrics")

    def infer_batch(self, batch: Any) -> dict[str, Any] | None:
        return tu.get(self.training_client.infer_batch(batch).get(), "metrics")

    def _balanced_order(self, input_ids: Any) -> list[int]:
        """The rows, so that each data-parallel rank gets as many of them and about as much work.

        The loss is a mean over the whole batch and does not depend on it.
        """
        work = calculate_workload(input_ids.offsets().diff())
        parts = get_seqlen_balanced_partitions(work.tolist(), k_partitions=self.data_parallel_size(), equal_size=True)
        order = []
        for part in parts:
            part.sort(key=lambda row: (work[row].item(), row))
            # Light ones at both ends: pipeline stages that fill or drain then wait less. verl orders them alike.
            order += part[::2] + part[1::2][::-1]
        return order


def train(config: DictConfig) -> bool:
    """Train with workers on the Ray cluster this process belongs to, or on one started here; whether to the end."""
    started_here = not ray.is_initialized()
    if started_here:
        # A running cluster has resources of its own.
        counts_processes = cpu.is_active() and not joins_cluster()
        ray.init(**(cpu.ray_init_args(config.trainer.n_gpus_per_node) if counts_processes else {}))
    try:
        apply_device(config)
        return SpeculatorSFTRayTrainer(config=config).fit()
    finally:
        if started_here:
            ray.shutdown()


def main(overrides: Sequence[str]) -> int:
    return run_trainer(train, overrides, world_size=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
