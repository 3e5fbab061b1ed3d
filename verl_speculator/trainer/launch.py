"""Starting a training on this machine: checks first, then torchrun or Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.configuration import load_config


def launch(overrides: Sequence[str], *, num_processes: int | None, use_ray: bool) -> NoReturn:
    """Check the run, then replace this process by the trainer's.

    :param num_processes: processes on this machine, each with a device of its own; None takes one for each device
    :raises SpeculatorError: one sentence about the first thing that cannot work
    """
    command, environment = plan(overrides, num_processes=num_processes, use_ray=use_ray)
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def plan(overrides: Sequence[str], *, num_processes: int | None, use_ray: bool) -> tuple[list[str], dict[str, str]]:
    """The command and the environment with which a run that has passed all checks is to be started."""
    config = load_config(overrides)
    # Only now: a mistyped key is answered before torch has been loaded.
    from verl_speculator.trainer.preflight import check_run
    from verl_speculator.trainer.values import refuse_on_cpu

    num_devices = _count_devices()
    if num_processes is None:
        given = any(override.lstrip("+").startswith("trainer.n_gpus_per_node=") for override in overrides)
        num_processes = config.trainer.n_gpus_per_node if use_ray and given else max(num_devices, 1)
    if num_devices == 0 and not use_ray:
        # A Ray driver may stand on a machine without the devices that its workers have.
        refuse_on_cpu(config)
    if num_processes < 1:
        raise ConfigError(f"--nproc must be at least 1, got {num_processes}")
    if use_ray:
        overrides = [*overrides, f"trainer.n_gpus_per_node={num_processes}"]
        check_run(load_config(overrides), num_processes * config.trainer.nnodes)
        arguments = ["-m", "verl_speculator.trainer.sft_trainer_ray"]
    else:
        if config.trainer.nnodes != 1:
            raise ConfigError("trainer.nnodes must be 1 here: for several machines add --ray, or run torchrun on each")
        if num_processes > num_devices > 0:
            raise ConfigError(f"--nproc={num_processes} is more than the {num_devices} devices of this machine")
        check_run(config, num_processes)
        arguments = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        arguments += ["-m", "verl_speculator.trainer.sft_trainer"]
    environment = dict(os.environ)
    if num_devices == 0:
        # One thread pool per process, together as wide as the machine.
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_processes, 1)))
    # verl warns in every process of each optional engine that is not installed.
    environment.setdefault("PYTHONWARNINGS", "ignore::UserWarning:verl.workers.engine")
    return [sys.executable, *arguments, *overrides], environment


def _count_devices() -> int:
    """GPUs or NPUs; verl uses no other accelerator."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if accelerator is not None and accelerator.type in ("cuda", "npu") else 0
