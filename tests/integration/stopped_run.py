"""Run under torchrun or alone as a Ray driver: a training in which the last process gets SIGTERM in its fourth step.

usage: stopped_run.py [--ray] key=value ...
"""

from __future__ import annotations

import os
import signal
import sys

from verl_speculator.trainer import sft_trainer, sft_trainer_ray
from verl_speculator.trainer.entry import run_trainer
from verl_speculator.trainer.loop import SpeculatorTrainingLoop

_train_step = SpeculatorTrainingLoop._train_step
_rank, _world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _train_step_and_signal(self, batch, position):
    if position.global_step == 4 and _rank == _world_size - 1:
        # As schedulers and torchrun do between them: more than once.
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    return _train_step(self, batch, position)


if __name__ == "__main__":
    SpeculatorTrainingLoop._train_step = _train_step_and_signal
    if sys.argv[1] == "--ray":
        status = sft_trainer_ray.main(sys.argv[2:])
    else:
        status = run_trainer(sft_trainer.train, sys.argv[1:], _world_size, _rank)
    print(f"status {status}")
    sys.exit(status)
