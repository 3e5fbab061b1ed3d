"""verl's training worker, made ready for our engines on any device. Importing it registers the FSDP engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import TrainingWorker

from verl_speculator.checkpoint.hidden_states import StatesCacheSettings
from verl_speculator.engine import register_megatron
from verl_speculator.platforms import cpu
from verl_speculator.trainer.config.megatron import check_packages
from verl_speculator.trainer.processes import comes_to_sight


class SpeculatorTrainingWorker(TrainingWorker):
    def __init__(self, config: Any) -> None:
        if config.engine_config.strategy == "megatron":
            # A Ray driver on another machine could not tell.
            check_packages(config.engine_config)
            register_megatron()
        if cpu.is_active():
            cpu.init_process_group()
        super().__init__(config)
        if self.model_config.freeze_base_model:
            # verl's estimate is for training the whole model: wrong where the base has no backward pass.
            self.flops_counter = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def sees(self, file: str) -> bool:
        """Whether a file that the driver has just written is there for this worker."""
        return comes_to_sight(Path(file))

    # The engine's hidden states on disk

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def use_states_cache(self, settings: StatesCacheSettings) -> None:
        """Before `reset`, which loads the base."""
        self.engine.use_states_cache(settings)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def states_bytes_per_token(self) -> int:
        return self.engine.cached_states.bytes_per_token

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def share_states(self) -> None:
        self.engine.cached_states.share()
