"""Run under torchrun: a training whose processes are killed (SIGKILL) in the middle of their second save.

usage: torchrun --nproc_per_node=N killed_run.py key=value ...
"""

from __future__ import annotations

import os
import signal
import sys

from verl_speculator.checkpoint import training_state
from verl_speculator.trainer.entry import run_trainer
from verl_speculator.trainer.sft_trainer import train

_saves = 0
_save = training_state.save_sharded


def _save_or_die(*args, **kwargs):
    global _saves
    _saves += 1
    if _saves == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return _save(*args, **kwargs)


if __name__ == "__main__":
    training_state.save_sharded = _save_or_die
    sys.exit(run_trainer(train, sys.argv[1:], int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])))
