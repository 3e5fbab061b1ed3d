"""Starting a training on this machine: checks first, then torchrun or Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.configuration import load_config
from verl_speculator.trainer.preflight import check_run


def launch(overrides: Sequence[str], *, num_processes: int | None, use_ray: bool) -> int:
    """Check the run, then replace this process by the trainer's.

    :raises SpeculatorError: one sentence about the first thing that cannot work
    """
    import torch

    num_processes = num_processes if num_processes is not None else max(torch.cuda.device_count(), 1)
    if num_processes < 1:
        raise ConfigError(f"the number of processes must be at least 1, got {num_processes}")
    overrides = list(overrides)
    if use_ray:
        overrides.append(f"trainer.n_gpus_per_node={num_processes}")
    config = load_config(overrides)
    check_run(config, num_processes * (config.trainer.nnodes if use_ray else 1))
    if use_ray:
        command = ["-m", "verl_speculator.trainer.sft_trainer_ray"]
    else:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command += ["-m", "verl_speculator.trainer.sft_trainer"]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        # One thread pool per process, together as wide as the machine.
        threads = max((os.cpu_count() or 1) // num_processes, 1)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *command, *overrides], environment)
