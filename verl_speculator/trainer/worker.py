"""verl's training worker, made ready for our engines on any device."""

from __future__ import annotations

from typing import Any

from verl.workers.engine_workers import TrainingWorker

import verl_speculator.engine  # noqa: F401 - registers the engines in this process
from verl_speculator.platforms import cpu


class SpeculatorTrainingWorker(TrainingWorker):
    def __init__(self, config: Any) -> None:
        if cpu.is_active():
            cpu.init_process_group()
        super().__init__(config)
        if self.model_config.freeze_base_model:
            # verl's estimate is for training the whole model: wrong where the base has no backward pass.
            self.flops_counter = None
