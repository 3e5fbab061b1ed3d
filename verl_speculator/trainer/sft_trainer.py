"""Training under torchrun: `torchrun --nproc_per_node=N -m verl_speculator.trainer.sft_trainer key=value ...`"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group
from verl.workers.utils.losses import sft_loss

from verl_speculator.platforms import cpu
from verl_speculator.trainer.checkpoints import RunCheckpoints
from verl_speculator.trainer.config.devices import apply_device
from verl_speculator.trainer.entry import run_trainer
from verl_speculator.trainer.loop import SpeculatorTrainingLoop
from verl_speculator.trainer.processes import TorchrunProcesses
from verl_speculator.trainer.worker import SpeculatorTrainingWorker


class SpeculatorSFTTrainer(SpeculatorTrainingLoop, SFTTrainer):
    """One process per rank; each loads its own part of the data and holds its own engine."""

    processes = TorchrunProcesses()

    def _build_engine(self) -> None:
        self.training_client = SpeculatorTrainingWorker(config=self.worker_config())
        self.training_client.set_loss_fn(loss_fn=base_loss)
        self.engine = self.training_client.engine
        # Now, since the model is not loaded before `reset`.
        self.ckpt_handler = RunCheckpoints(self.config, self.engine, self.processes)
        # Once for all: the others read the file. The engine has the same dictionary, and is not built yet.
        self.model_config.speculator.update(self.processes.on_first(self.chosen_draft_vocabulary))

    def _init_engine(self) -> None:
        self._plan_steps()
        self._load_model()

    def _build_ckpt_handler(self) -> None:
        """Built with the engine."""

    def data_shard(self) -> tuple[int, int]:
        return self.engine.get_data_parallel_rank(), self.engine.get_data_parallel_size()

    def data_parallel_size(self) -> int:
        return self.engine.get_data_parallel_size()

    def is_logging(self) -> bool:
        return self.engine.is_mp_src_rank_with_outputs() and self.engine.get_data_parallel_rank() == 0

    def prefetch_states(self, batch: Mapping[str, Any]) -> None:
        self.engine.cached_states.prefetch(batch["input_ids"])

    def train_batch(self, batch: Any) -> dict[str, Any] | None:
        output = self.training_client.train_batch(data=batch)
        self.training_client.step_profile()
        return self._metrics(output)

    def infer_batch(self, batch: Any) -> dict[str, Any] | None:
        return self._metrics(self.training_client.infer_batch(batch))

    def _metrics(self, output: Any) -> dict[str, Any] | None:
        return tu.get(output, "metrics") if self.engine.is_mp_src_rank_with_outputs() else None


def base_loss(**kwargs: Any) -> Any:
    """verl's SFT loss of the base model, for joint training."""
    return sft_loss(config=None, **kwargs)


@contextmanager
def in_process_group(config: DictConfig) -> Iterator[None]:
    """With torchrun's processes joined, and what follows from the device filled into the configuration."""
    if cpu.is_active():
        cpu.init_process_group()
    else:
        initialize_global_process_group()
    try:
        apply_device(config)
        yield
    finally:
        destroy_global_process_group()


def train(config: DictConfig) -> bool:
    """Train in this process and its torchrun siblings; whether to the end."""
    with in_process_group(config):
        return SpeculatorSFTTrainer(config=config).fit()


if __name__ == "__main__":
    world_size, rank, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    sys.exit(run_trainer(train, sys.argv[1:], world_size, rank, local_rank))
