"""Starting a training on this machine: checks first, then torchrun or Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from omegaconf import DictConfig

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.config.compose import engine_name, load_config


def launch(overrides: Sequence[str], *, num_processes: int | None, use_ray: bool) -> NoReturn:
    """Check the run, then replace this process by the trainer's.

    Args:
        overrides: `key=value` from the command line.
        num_processes: processes on this machine, each with a device of its own; None takes one for each device.
        use_ray: start a Ray driver instead of torchrun.

    A process that torchrun has started goes on as the trainer itself, which checks the same and speaks once.

    Raises:
        SpeculatorError: one sentence about the first thing that cannot work.
    """
    _become(*plan(overrides, num_processes=num_processes, use_ray=use_ray))


def launch_hidden_states(overrides: Sequence[str], *, num_processes: int | None) -> NoReturn:
    """Check the run, then replace this process by torchrun's, which writes the hidden states of its data.

    Raises:
        SpeculatorError: one sentence about the first thing that cannot work.
    """
    folder = load_config(overrides).data.hidden_states_cache
    if folder is None:
        raise ConfigError("data.hidden_states_cache must be given: the folder for the hidden states")
    # Held by one command at a time, and with no checkpoint to go on from.
    own = [f"trainer.default_local_dir={folder}", "trainer.resume_mode=disable"]
    module = "verl_speculator.trainer.store_hidden_states"
    _become(*plan([*overrides, *own], num_processes=num_processes, use_ray=False, module=module))


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    # The same process goes on under another name, so that signals and the exit status need no passing on.
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def plan(
    overrides: Sequence[str],
    *,
    num_processes: int | None,
    use_ray: bool,
    module: str = "verl_speculator.trainer.sft_trainer",
) -> tuple[list[str], dict[str, str]]:
    """The command and the environment with which a run that has passed all checks is to be started.

    Args:
        overrides: As for `launch`; so are the next two.
        module: What torchrun runs.
    """
    if "LOCAL_RANK" in os.environ:
        if use_ray or num_processes is not None:
            raise ConfigError(f"{'--ray' if use_ray else '--nproc'} has no meaning under torchrun: leave it out")
        return [sys.executable, "-m", module, *overrides], dict(os.environ)
    config = load_config(overrides)
    # Only now: a mistyped key is answered before torch has been loaded.
    from verl_speculator.trainer.config.preflight import check_run
    from verl_speculator.trainer.config.rules import refuse_on_cpu

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
        # The driver learns from the configuration alone how many workers to start.
        overrides = [*overrides, f"trainer.n_gpus_per_node={num_processes}"]
        world_size = num_processes * config.trainer.nnodes
        check_run(load_config(overrides), world_size, workers_elsewhere=joins_cluster())
        arguments = ["-m", "verl_speculator.trainer.sft_trainer_ray"]
    else:
        if config.trainer.nnodes != 1:
            raise ConfigError("trainer.nnodes must be 1 here: for several machines add --ray, or run torchrun on each")
        if num_processes > num_devices > 0:
            raise ConfigError(f"--nproc={num_processes} is more than the {num_devices} devices of this machine")
        check_run(config, num_processes)
        arguments = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        arguments += ["-m", module]
    environment = dict(os.environ)
    if num_devices == 0:
        # One thread pool per process, together as wide as the machine.
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_processes, 1)))
    environment.setdefault("PYTHONWARNINGS", ",".join(_expected_warnings(config, on_cpu=num_devices == 0)))
    return [sys.executable, *arguments, *overrides], environment


def _expected_warnings(config: DictConfig, on_cpu: bool) -> list[str]:
    """Of what is not installed and not needed; every process would repeat them."""
    filters = ["ignore::UserWarning:verl.workers.engine"]
    if engine_name(config) == "megatron" and config.engine.vanilla_mbridge is None:
        # Taken only where there is no newer bridge.
        filters.append("ignore:The legacy mbridge backend:FutureWarning")
    if engine_name(config) == "megatron" and on_cpu:
        filters.append("ignore:Transformer Engine and Apex are not installed:UserWarning")
        filters.append("ignore:Apex is not installed:UserWarning")
    return filters


def joins_cluster() -> bool:
    """Whether Ray will use a running cluster instead of starting one on this machine."""
    return "RAY_ADDRESS" in os.environ


def _count_devices() -> int:
    """GPUs or NPUs; verl uses no other accelerator."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if accelerator is not None and accelerator.type in ("cuda", "npu") else 0
